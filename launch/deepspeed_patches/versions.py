"""Which releases of DeepSpeed the workarounds of this package were tested with."""

from importlib.metadata import PackageNotFoundError, version

from launch.errors import UserError

TESTED = ("0.19.8",)


def check_version(allow_untested: bool = False) -> None:
    """Reject a DeepSpeed whose defects are not known: a workaround may be missing, or do harm.

    Args:
        allow_untested: go on all the same.

    Raises:
        UserError: where DeepSpeed is missing, or of another version than those tested.
    """
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise UserError(
            f"deepspeed: it is not installed; pip install deepspeed=={TESTED[-1]}"
        ) from None
    if found not in TESTED and not allow_untested:
        raise UserError(
            f"deepspeed: this is {found}, and the workarounds for its defects were tested with "
            f"{', '.join(TESTED)}; install that, or compare with scripts/parity.py and go on with "
            "--allow-untested-deepspeed"
        )
