"""Run a recipe as a job on Slurm, ssh hosts, OpenMPI, Kubernetes, Kubeflow or SkyPilot.

May import `doctor`, `runtime`, `config` and the layers below them.
"""
