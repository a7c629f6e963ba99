"""Hosts by ssh: the `deepspeed` command with a hostfile, which starts them through pdsh."""

import re

from launch.cluster.host_backend import HostBackend
from launch.cluster.hosts import hosts_of
from launch.cluster.job import Job
from launch.errors import UserError

# What DeepSpeed writes into the remote command as it is; anything else it puts between double quotes.
PLAIN_VALUE = re.compile(r"[\w@%+=:,./-]*")


class Backend(HostBackend):
    """Starts `deepspeed --hostfile` under a supervisor on this machine."""

    script, program, package, on_every_host = "ssh.sh", "pdsh", "pdsh", False

    def files(self, job: Job) -> dict[str, str]:
        """The script, DeepSpeed's hostfile and its file of variables."""
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
    """A variable's value for `.deepspeed_env`, so that it arrives as it is.

    DeepSpeed strips it, puts it between double quotes unless it is plain, and hands it to pdsh, which
    replaces %n and the like, and then to a shell on the host.

    Raises:
        UserError: for a value of several lines, which that file cannot hold.
    """
    if len(f"{value}.".splitlines()) > 1:  # a carriage return too ends a line of that file
        raise UserError(
            f"environment.{name}: a value of several lines cannot be handed over by deepspeed; "
            "put it into a file"
        )
    if PLAIN_VALUE.fullmatch(value):
        return value.replace("%", "%%")
    text = re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")
    # DeepSpeed strips the value, so a blank at its ends needs a pair of quotes outside of it.
    before = '""' if text != text.lstrip() else ""
    after = '""' if text != text.rstrip() else ""
    return f"{before}{text}{after}"
