"""A recipe as a job on somebody's cluster: Slurm, ssh hosts, MPI, Kubernetes, the clouds."""
