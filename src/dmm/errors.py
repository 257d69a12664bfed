"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """Bad input, told in one sentence: what, where, what was expected, what to do.

    The command line prints its text and exits with status 2; anything else that is raised is a
    defect of ours and keeps its traceback.
    """
