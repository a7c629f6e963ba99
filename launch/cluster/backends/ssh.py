"""Hosts over ssh: the `deepspeed` command with a hostfile, which starts them through pdsh."""

import re

from launch.cluster.backends.host_backend import HostBackend
from launch.cluster.hosts import hosts_of
from launch.cluster.job import Job
from launch.errors import UserError

# Values that DeepSpeed puts into the remote command unquoted; all others get double quotes.
PLAIN_VALUE = re.compile(r"[\w@%+=:,./-]*")


class Backend(HostBackend):
    """Starts `deepspeed --hostfile` under a supervisor on this machine."""

    script, program, package, on_every_host = "ssh.sh", "pdsh", "pdsh", False

    def files(self, job: Job) -> dict[str, str]:
        """The script, DeepSpeed's hostfile and its environment file."""
        self.check_paths(job)
        hosts = list(hosts_of(job))
        return {
            "ssh.sh": job.render("ssh.sh.j2", master=hosts[0], port=self.port(job)),
            "hostfile": "".join(f"{host} slots={job.gpus_per_node}\n" for host in hosts),
            "deepspeed_env": "".join(
                f"{name}={escaped(name, value)}\n" for name, value in job.environment.items()
            ),
        }


def escaped(name: str, value: str) -> str:
    """Escape a variable's value for `.deepspeed_env`, so that it arrives unchanged.

    DeepSpeed strips it, puts it in double quotes unless it is plain, and passes it to pdsh, which
    expands %n and similar, and then to a shell on the host.

    Raises:
        UserError: for a multi-line value, which that file cannot represent.
    """
    if len(f"{value}.".splitlines()) > 1:  # a carriage return also ends a line in that file
        raise UserError(
            f"environment.{name}: a value of several lines cannot be handed over by deepspeed; "
            "put it into a file"
        )
    if PLAIN_VALUE.fullmatch(value):
        return value.replace("%", "%%")
    text = re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")
    # DeepSpeed strips the value, so leading or trailing spaces are protected by `""` beyond them.
    before = '""' if text != text.lstrip() else ""
    after = '""' if text != text.rstrip() else ""
    return f"{before}{text}{after}"
