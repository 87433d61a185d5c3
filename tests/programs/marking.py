"""The code of a policy that says that it ran: in the file that `MARK` names."""

import os


open(os.environ["MARK"], "a").write("ran")


class Marking:
    pass
