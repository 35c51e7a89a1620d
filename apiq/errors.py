"""The one exception that users are meant to read."""


class ApiqError(Exception):
    """A refusal or failure told in one sentence: what was found, where, and what to change.

    The command line and the stages print it as it is and leave with status 1; everything
    else that escapes is a defect and keeps its traceback.
    """
