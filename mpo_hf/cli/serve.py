"""`mpo-hf serve`: `transformers serve` in a process with the classes of mixtures."""

import os
from collections.abc import Sequence


HELP = """\
usage: mpo-hf serve MIXTURE [options]

Serves a mixture to OpenAI clients: `transformers serve`, with the same options, in a process with the classes of
mixtures.
Needs `pip install "transformers[serving]"`.

the main options:
  MIXTURE                folder or repo id; without it, models are loaded when a request names them
  --host, --port         address of the server; localhost and 8000 by default
  --device, --dtype      device and dtype of the policies
  --default-seed         seed of the sampling
  --help_all             all options of `transformers serve`

examples:
  mpo-hf serve mix --port 8080
  mpo-hf serve user/mix --device cuda --dtype bfloat16
"""


def run(argv: Sequence[str]) -> None:
    """Runs `mpo-hf serve`; the arguments are those of `transformers serve`."""
    if "--help" in argv or "-h" in argv:
        print(HELP, end="")
        return
    if "--continuous-batching" in argv:
        raise ValueError("Mixtures have no continuous batching: leave out `--continuous-batching`.")

    import transformers
    from transformers.cli.transformers import app
    from transformers.utils.import_utils import is_serve_available

    from .auto_dtype import OpenedMixture
    from .early_checks import check_address
    from .serve_requests import answer_client_errors

    argv = ["--help" if argument == "--help_all" else argument for argument in argv]
    if "--help" not in argv:
        if not is_serve_available():
            raise ValueError('`mpo-hf serve` needs a web server: `pip install "transformers[serving]"`.')
        from transformers.cli.serving import server

        source = argv[0].partition("@")[0] if argv else ""
        if source.startswith(("/", "./", "../")) and not os.path.isdir(source):
            raise OSError(f"There is no folder {source!r} to serve.")
        check_address(_value(argv, "--host") or "localhost", _value(argv, "--port") or "8000")
        server.build_server = answer_client_errors(server.build_server)
    # the server looks up the class that a config names in the package of Transformers only
    transformers.MixturePolicyModel = OpenedMixture
    app(["serve", *argv], prog_name="mpo-hf")


def _value(argv: Sequence[str], option: str) -> str | None:
    """The value of an option of `transformers serve`."""
    parts = [part for argument in argv for part in argument.split("=", 1)]
    return parts[parts.index(option) + 1] if option in parts[:-1] else None
