"""A reward that writes down the completions that it is given: in the file that `SEEN` names."""

import json
import os
from pathlib import Path


def see(completions, **kwargs):
    Path(os.environ["SEEN"]).write_text(json.dumps(completions))
    return [0.0] * len(completions)
