"""Whether a machine, or several, will run DeepSpeed; and what to mend where they will not."""
