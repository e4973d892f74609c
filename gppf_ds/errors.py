"""Errors that are the user's to mend, each with one sentence that names what is wrong and what to change."""


class UserError(Exception):
    """Bad configuration, data, checkpoint or hostfile. The command line prints the sentence and exits with code 2."""


class SampleError(Exception):
    """One sample cannot be read. The loader logs it, takes the task's next sample instead and counts it."""
