"""Hosts through mpirun, which starts DeepSpeed's per-node launcher on each."""

import os

from launch.cluster.backends.host_backend import HostBackend
from launch.cluster.hosts import hosts_of
from launch.cluster.job import Job


class Backend(HostBackend):
    """Starts `mpirun` under a supervisor on this machine."""

    script, program, package, on_every_host = "openmpi.sh", "mpirun", "openmpi-bin", True

    def files(self, job: Job) -> dict[str, str]:
        """The script, the per-host script, and mpirun's hostfile."""
        self.check_paths(job)
        hosts = list(hosts_of(job))
        return {
            "openmpi.sh": job.render("openmpi.sh.j2", root=os.geteuid() == 0),
            "node.sh": job.render("openmpi_node.sh.j2", master=hosts[0], port=self.port(job)),
            "hostfile": "".join(f"{host} slots=1\n" for host in hosts),
        }
