"""Checks of options that would fail late, after models have been opened."""

import os
import socket

import torch
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint

from ..mixture.config_schema import is_model_dtype
from ..trainer import MPOConfig
from .parser import UsageError


def check_dtype(option: str, name: str | None) -> None:
    """Refuses names that are no floating point type of torch."""
    if name != "auto" and not is_model_dtype(name or "float32"):
        raise UsageError(f"{option} must name a floating point type of torch, such as bfloat16, got {name!r}.")


def check_device(name: str | None) -> None:
    """Refuses devices that are not there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        raise UsageError(f"--device {name} cannot be used: {str(err).splitlines()[0]}") from err


def check_reporters(args: MPOConfig) -> None:
    """Refuses to log to what is not installed."""
    try:
        callbacks = get_reporting_integration_callbacks(args.report_to)
    except ValueError as err:
        raise UsageError(f"--report_to: {err}") from err
    for callback in callbacks:
        try:
            callback()
        except (RuntimeError, ImportError) as err:
            raise ValueError(
                f"--report_to {' '.join(args.report_to)}: {' '.join(str(err).split())} Install it, or leave it out: "
                "trainer_state.json has all numbers."
            ) from err


def check_folder(args: MPOConfig, resume: str | bool | None) -> None:
    """
    Refuses a folder that cannot be written to, another fit in the folder of one, and checkpoints that are not there.

    Args:
        args ([`MPOConfig`]): the options.
        resume (`str` or `bool`, *optional*): the checkpoint to go on from, or whether to take the last one.
    """
    folder = args.output_dir
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as err:
        raise OSError(f"--output_dir {folder} cannot be a folder: {err.strerror}.") from err
    if not os.access(folder, os.W_OK):
        raise OSError(f"--output_dir {folder} cannot be written to.")
    if resume is True and get_last_checkpoint(folder) is None:
        raise OSError(f"There is no checkpoint in {folder!r} to resume from. Leave out --resume_from_checkpoint.")
    if isinstance(resume, str) and not os.path.isfile(os.path.join(resume, "trainer_state.json")):
        raise OSError(f"--resume_from_checkpoint {resume} is not the folder of a checkpoint.")
    store = os.path.join(folder, "_rollouts")
    has_completions = os.path.isdir(store) and any(name.endswith(".parquet") for name in os.listdir(store))
    if has_completions and not resume and args.estimator == "mis":
        raise UsageError(
            f"The folder {folder!r} holds the completions of an earlier fit. Go on with it by --resume_from_checkpoint true, "
            f"fit to them by --rollouts {store}, or choose another --output_dir."
        )


def check_address(host: str, port: str) -> None:
    """Refuses the address of a server that another program listens on, before a mixture is loaded."""
    if not port.isdigit() or not 0 <= int(port) < 2**16:
        raise UsageError(f"--port must be a number from 0 to {2**16 - 1}, got {port!r}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as err:
        raise OSError(
            f"The server cannot listen on {host}, port {port}: {err.strerror}. Choose another --port, or another --host."
        ) from err
