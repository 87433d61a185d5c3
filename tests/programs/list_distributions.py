"""What is installed beside this interpreter, as JSON: names, versions, and the versions of Python that they are for."""

import json
from importlib.metadata import distributions


rows = [[d.metadata["Name"], d.version, d.metadata["Requires-Python"] or ""] for d in distributions()]
print(json.dumps(rows))
