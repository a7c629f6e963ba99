"""Training starts on a DeepSpeed whose defects are known, or when its user says so."""

import re
from importlib import metadata

import pytest

from launch.deepspeed_patches import versions
from launch.deepspeed_patches.versions import TESTED, check_version
from launch.errors import UserError
from launch.paths import ROOT


def test_the_pinned_version_is_the_tested_one() -> None:
    pinned = re.search(r"^deepspeed==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert pinned and pinned[1] == TESTED[-1] == metadata.version("deepspeed")
    check_version()


def test_another_version_is_rejected_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "0.20.1")
    with pytest.raises(UserError, match=r"this is 0\.20\.1, .*--allow-untested-deepspeed$"):
        check_version()
    check_version(allow_untested=True)


def test_a_missing_deepspeed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    with pytest.raises(
        UserError, match=r"^deepspeed: it is not installed; pip install deepspeed=="
    ):
        check_version(allow_untested=True)
