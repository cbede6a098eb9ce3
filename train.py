"""python train.py COMMAND --config FILE: the door to everything; see seglab/cli/."""

from seglab.cli import main

if __name__ == "__main__":
    main()
