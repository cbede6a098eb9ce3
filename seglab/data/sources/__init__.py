"""Sources of samples: files on disk, and sources around sources."""

from seglab.data.sources.files import FileSource as FileSource
from seglab.data.sources.files import Item as Item
from seglab.data.sources.labels import LabelTable as LabelTable
from seglab.data.sources.source import IGNORE_INDEX as IGNORE_INDEX
from seglab.data.sources.source import Source as Source
from seglab.data.sources.source import SourceWrapper as SourceWrapper
