"""What the doors do for Cog only: settings from one text input, and messages that are fit for a stranger.

Free of torch: `train.py --help` imports this.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import functools
import gc
import sys
import traceback
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cog.types import URLPath
from requests import RequestException

from preprocessing.errors import UserError, redacted, short
from trainer import commandline
from trainer.config import JobSettings

LONGEST_CONFIG = 2**20  # bytes
LONGEST_TRACEBACK = 20_000  # characters


class JobFailed(RuntimeError):
    """A bug, told to a client in one line; its traceback is in the log."""


@contextmanager
def told_shortly() -> Iterator[None]:
    """Any error inside leaves as one short line without secrets: Cog puts it in the response, and a message of
    megabytes ends the worker for good. The traceback of a bug goes to the log, redacted too.
    """
    try:
        yield
    except UserError as error:
        raise UserError(short(str(error))) from None
    except Exception as error:
        print(redacted(traceback.format_exc())[-LONGEST_TRACEBACK:], file=sys.stderr)
        raise JobFailed(short(f"{type(error).__name__}: {error}")) from None


def redact_downloads() -> None:
    """Make Cog's own download of inputs fail in one sentence too.

    Cog fetches http(s) inputs before it calls a door, and puts the library's message, which quotes the address with all
    that is secret in it, into its log and its answer.
    """
    convert = URLPath.convert
    if hasattr(convert, "__wrapped__"):  # both doors in one process
        return

    @functools.wraps(convert)
    def converted(self: URLPath) -> Path:
        try:
            return convert(self)
        except RequestException as error:
            raise UserError(short(f"{self.source} cannot be downloaded ({reason(error)}): check the URL")) from None

    URLPath.convert = converted


def give_memory_back() -> None:
    """What a job used goes back to the system: twenty small jobs left an eighth more with the worker than two."""
    gc.collect()  # nets refer to themselves
    with suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def reason(error: RequestException) -> str:
    """Why a download failed, without the library's words."""
    return type(error).__name__ if error.response is None else f"status {error.response.status_code}"


def decoded(url: str, name: str) -> bytes:
    """The content of a data: URL; `name` is the input that it came in."""
    head, comma, content = url.partition(",")
    if not comma:
        raise UserError(f"{name} is a data: URL without content: it has no comma")
    if not head.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(content)
    try:
        return base64.b64decode(urllib.parse.unquote_to_bytes(content), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name} is a data: URL whose content is no base64 ({error})") from error


def read_config(config: str) -> dict[str, Any]:
    """The settings in the `config` input: YAML or JSON as text, as a data: URL, or in the file that it names."""
    content: str | bytes = config
    if config.startswith("data:"):
        content = decoded(config, "config")
    elif _names_a_file(config):
        path = Path(config.strip())
        if path.stat().st_size > LONGEST_CONFIG:
            raise UserError(f"config {path} is larger than 1 MiB: give a YAML file of settings")
        content = path.read_bytes()
    if len(content) > LONGEST_CONFIG:
        raise UserError("config is larger than 1 MiB: give lines of the form name: value")
    return commandline.parse_recipe(content, "config", JobSettings)


def _names_a_file(config: str) -> bool:
    """One line that is a file's path; text of settings has a colon and a space, or several lines."""
    line = config.strip()
    return 0 < len(line) < 1000 and "\n" not in line and "\0" not in line and Path(line).is_file()


def job_settings(inputs: Mapping[str, Any], config: str | None, outputs: Path, fresh: str) -> JobSettings:
    """The settings of a job: inputs that differ from their default, over `config`, over the defaults.

    The job works in the folder `fresh` of `outputs`, or in one inside `outputs` that `config` names.
    """
    told = read_config(config) if config else {}
    given = {name: value for name, value in inputs.items() if value != JobSettings.model_fields[name].default}
    places = {name: f"config: {name}" for name in told if name not in given}
    settings = commandline.check(JobSettings, {"output_dir": outputs / fresh} | told | given, places)
    inside, around = settings.output_dir.resolve(), outputs.resolve()
    if around not in inside.parents:  # a request over the network must not write anywhere else
        raise UserError(f"config: output_dir {settings.output_dir} is not inside {outputs}: name a folder in it")
    return settings


def resumable(output_dir: Path) -> str | None:
    """How to go on after a job that did not end, or None where it left no checkpoint."""
    finished = sorted((output_dir / "checkpoints").glob("step_*/info.json"))
    if not finished:
        return None
    return (
        f"the last checkpoint is {finished[-1].parent}; to go on from it give the same inputs again, with these lines "
        f"in config:\nresume: true\noutput_dir: {output_dir}"
    )
