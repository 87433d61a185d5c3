"""Owns a folder until it is killed, with a child that lives on for a while. Says so."""

import json
import os
import sys
import time

from mpo_hf.trainer.folder_lock import locked


values = json.loads(sys.argv[1])
with locked(values["folder"]):
    if os.fork() == 0:
        time.sleep(values["seconds"])
        os._exit(0)
    print("mine", flush=True)
    time.sleep(600)
