"""Carries a command through the deepspeed launcher, which hands words to a shell on every machine without quoting them.

``python -m gppf_ds.launched --encode WORD ...`` prints the present folder and the words as one word of letters, digits,
dashes and underscores; ``python -m gppf_ds.launched THAT`` enters the folder and runs ``gppf-ds WORD ...`` there.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Sequence

from gppf_ds import cli


def encode(folder: str, words: Sequence[str]) -> str:
    """A folder and words as one word that no shell reads as anything else."""
    return base64.urlsafe_b64encode(json.dumps([folder, *words]).encode()).decode().rstrip("=")


def decode(word: str) -> tuple[str, list[str]]:
    """The folder and the words."""
    folder, *words = json.loads(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)))
    return folder, words


def main(arguments: list[str]) -> int:
    """Encodes, or runs what was encoded."""
    if arguments[0] == "--encode":
        print(encode(os.getcwd(), arguments[1:]))
        return 0
    folder, words = decode(arguments[0])
    try:
        os.chdir(folder)
    except OSError as error:
        print(f"error: the folder {folder} cannot be entered on this machine: {error.strerror}.", file=sys.stderr)
        return 2
    sys.path.insert(0, folder)
    sys.argv[1:] = words
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
