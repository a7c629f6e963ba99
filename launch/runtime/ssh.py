"""Run commands on other hosts over ssh, and read hostfiles."""

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch.errors import UserError

CONNECT_SECONDS = 8


# ssh's error messages and their fixes.
FAILURES = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key has changed since it was last seen; if "
     "the host was installed anew: ssh-keygen -R {host}; ssh-keyscan {host} >> ~/.ssh/known_hosts"),
    ("Host key verification failed", "its host key is unknown; run: ssh-keyscan {host} >> "
     "~/.ssh/known_hosts, and compare the key"),
    ("Could not resolve hostname", "nobody knows this name; look for a typing error, or add it to "
     "/etc/hosts"),
    ("Permission denied", "ssh asks for a password; run: ssh-copy-id {host}"),
    ("Connection refused", "nothing listens for ssh there; start its sshd"),
    ("No route to host", "unreachable; is it switched on and in this network?"),
    ("Network is unreachable", "unreachable; is it in this network?"),
    ("Connection timed out", "unreachable: no answer within {seconds} s; is it switched on?"),
    ("Operation timed out", "unreachable: no answer within {seconds} s; is it switched on?"),
    ("Connection closed by", "it closes the connection; see the log of its sshd"),
)  # fmt: skip


def ssh_command(host: str) -> list[str]:
    """The ssh command for a host: no prompts, a short timeout, the user's host key settings."""
    return [
        "ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}",
        "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", host,
    ]  # fmt: skip


def read_hostfile(path: Path) -> dict[str, int]:
    """Read hosts and slots, in order, from a file in DeepSpeed's format: `host1 slots=8`.

    Raises:
        UserError: with file and line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the hostfile ({error}); name one") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if not match:
            raise UserError(f"{path}:{number}: '{text}' is no host; write: host1 slots=8")
        if match.group(1) in hosts:
            raise UserError(f"{path}:{number}: {match.group(1)} is there twice; take one line out")
        hosts[match.group(1)] = int(match.group(2))
    if not hosts:
        raise UserError(f"{path}: there is no host in it; write a line for each: host1 slots=8")
    return hosts


def run_on_host(
    host: str, argv: Sequence[str], stdin: str | None = None, timeout: float = 20
) -> str:
    """Run a command on another host and return its output.

    Args:
        host: the host's name for ssh.
        argv: the command's arguments; quoted for the remote shell.
        stdin: text for its standard input.
        timeout: seconds.

    Raises:
        UserError: if the host cannot be reached or the command fails, with the fix.
    """
    try:
        done = subprocess.run(
            [*ssh_command(host), shlex.join(argv)],
            input=stdin or "", capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError("there is no ssh on this machine; apt-get install openssh-client") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"host {host}: '{argv[0]}' has not ended within {timeout:.0f} s; the host or its disk hangs"
        ) from None
    if done.returncode == 0:
        return done.stdout
    if done.returncode == 255:
        for words, meaning in FAILURES:
            if words in done.stderr:
                raise UserError(
                    f"host {host}: {meaning.format(host=host, seconds=CONNECT_SECONDS)}"
                )
    if done.returncode == 127:
        raise UserError(
            f"host {host}: there is no {argv[0]}; checkout and Python have to be at the same path on "
            "every host"
        )
    last = (done.stderr.strip() or done.stdout.strip() or "no words").splitlines()[-1]
    raise UserError(f"host {host}: '{argv[0]}' failed with exit code {done.returncode}: {last}")
