"""Stands for `launch.versions.worker`: answers as told by a file beside it, without torch or DeepSpeed."""

import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path.cwd()  # that of the version
    with (folder / "asked").open("a") as asked:
        asked.write("\n".join(sys.argv[1:]) + "\n")
    print((folder / "answers").read_text(), end="")
    sys.exit((folder / "stderr").read_text() if (folder / "stderr").exists() else 0)
