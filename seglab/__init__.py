"""seglab: semantic-segmentation training whose numbers one can trust."""

__version__ = "0.1.0"
