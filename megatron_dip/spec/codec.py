"""Reads and writes the project's JSON files, strictly.

Reading: unknown fields, other versions, duplicate keys, wrong types and numbers that cannot be end in an
:class:`~megatron_dip.spec.errors.InputError` that names the file and the field; nothing is guessed. A workload comes back resolved: its
model as a :class:`~megatron_dip.spec.model.ModelSpec`, its profile as a :class:`~megatron_dip.spec.profile.Profile` (a path in it is
relative to the workload's file). Writing: a file appears whole or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import msgspec.inspect

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.named import named_model
from megatron_dip.spec.partition import PARTITION_FORMAT, Partition
from megatron_dip.spec.plan import PLAN_FORMAT, Plan
from megatron_dip.spec.profile import PROFILE_FORMAT, Profile
from megatron_dip.spec.timeline import TIMELINE_FORMAT, Timeline
from megatron_dip.spec.training import EXAMPLE_FORMAT, ExampleConfig, VideoExampleConfig
from megatron_dip.spec.workload import WORKLOAD_FORMAT, Workload

T = TypeVar("T", bound=msgspec.Struct)

STANDARD_INPUT = "-"
"""As a file to read."""

FORMATS: dict[type, str] = {
    Workload: WORKLOAD_FORMAT,
    Profile: PROFILE_FORMAT,
    Plan: PLAN_FORMAT,
    Partition: PARTITION_FORMAT,
    Timeline: TIMELINE_FORMAT,
    ExampleConfig: EXAMPLE_FORMAT,
    VideoExampleConfig: EXAMPLE_FORMAT,
}


def load_workload(path: str | Path) -> Workload:
    """Reads, resolves and validates a workload."""
    path = Path(path)
    return resolve_workload(_load(path, Workload), path)


def resolve_workload(workload: Workload, path: Path) -> Workload:
    """The workload with its named model and its profile's file put in, validated; ``path`` is the file that it stands in."""
    if isinstance(workload.model, str):
        with _named_in(path):
            workload = msgspec.structs.replace(workload, model=named_model(workload.model))
    if isinstance(workload.profile, str):
        profile_path = path.parent / workload.profile
        if not profile_path.is_file():
            raise InputError(
                f"{_name(path)}: profile", workload.profile, f"there is no file {profile_path}", "give a path relative to the workload's file"
            )
        workload = msgspec.structs.replace(workload, profile=load_profile(profile_path))
    with _named_in(path):
        workload.validate()
    return workload


def load_profile(path: str | Path) -> Profile:
    path = Path(path)
    profile = _load(path, Profile)
    with _named_in(path):
        profile.validate()
    return profile


def load_partition(path: str | Path) -> Partition:
    """Reads a partition that has chunks at all; whether it fits a model is for :meth:`Partition.validate` to say."""
    path = Path(path)
    partition = _load(path, Partition)
    if not partition.chunks:
        raise InputError(f"{_name(path)}: chunks", partition.chunks, "no module has chunks", "give each module's layers on each rank")
    for module, rows in partition.chunks.items():
        if not rows:
            raise InputError(f"{_name(path)}: chunks.{module}", rows, "no chunks", "give at least one row of layers on each rank")
    return partition


def load_plan(path: str | Path) -> Plan:
    """Reads a plan's form; whether it holds is for :func:`megatron_dip.schedule.checker.check_plan` to say."""
    return _load(Path(path), Plan)


def load_timeline(path: str | Path) -> Timeline:
    """Reads and validates a timeline."""
    return decode_timeline(read_file(path), Path(path))


def decode_timeline(data: bytes, path: Path) -> Timeline:
    """As :func:`load_timeline`, of a file that was read already."""
    timeline = decode(data, Timeline, _name(path))
    with _named_in(path):
        timeline.validate()
    return timeline


def decode_plan(data: bytes, path: Path) -> Plan:
    """As :func:`load_plan`, of a file that was read already."""
    return decode(data, Plan, _name(path))


def load_example(path: str | Path) -> ExampleConfig:
    """Reads and validates the ``config.json`` of an example's folder."""
    path = Path(path)
    config = _load(path, VideoExampleConfig if _has_video(path) else ExampleConfig)
    with _named_in(path):
        config.validate()
    return config


def _has_video(path: Path) -> bool:
    """Whether the file's model makes video; False for what cannot be read, which :func:`_load` tells of."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    model = raw.get("model") if isinstance(raw, dict) else None
    return isinstance(model, dict) and "video" in model


def read_file(path: str | Path) -> bytes:
    """The file's bytes; of ``-`` those of standard input.

    Commands that take files of several kinds read each once, so that a pipe can be one of them.
    """
    try:
        if str(path) == STANDARD_INPUT:
            return sys.stdin.buffer.read()
        return read_whole(path)
    except OSError as error:
        raise InputError(str(path), str(path), f"cannot be read ({error.strerror})", "name a file that exists and is readable") from None


def read_whole(path: str | Path) -> bytes:
    """The file's bytes. Raises OSError, also for a device that gives bytes without end."""
    if not stat.S_ISCHR(os.stat(path).st_mode):
        return Path(path).read_bytes()
    with open(path, "rb") as file:
        data = file.read(_MOST_OF_A_DEVICE + 1)
    if len(data) > _MOST_OF_A_DEVICE:
        raise OSError(errno.EFBIG, f"no end within {_MOST_OF_A_DEVICE} bytes")
    return data


_MOST_OF_A_DEVICE = 2**26


def format_of(data: bytes) -> str | None:
    """What a file's ``format`` says, None where it has none or is no JSON object."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return raw.get("format") if isinstance(raw, dict) else None


def decode(text: str | bytes, kind: type[T], name: str, wanted: str | None = None) -> T:
    """Reads one object from JSON text; ``name`` is what messages call the text.

    Args:
        wanted: its format, for kinds that other rooms define.
    """
    wanted = FORMATS[kind] if wanted is None else wanted
    try:
        raw = json.loads(text, object_pairs_hook=_reject_duplicates)
    except InputError as error:
        raise _prefixed(error, name) from None
    except json.JSONDecodeError as error:
        raise InputError(
            name, _excerpt(error.doc, error.pos), f"broken JSON at line {error.lineno}, column {error.colno}: {error.msg}", "mend the JSON there"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(name, error.object[error.start : error.start + 8], "not UTF-8 text", "save the file as UTF-8 JSON") from None
    except RecursionError:
        raise InputError(name, "...", "nested too deeply", "give an object of the documented form") from None
    except ValueError as error:  # a whole number of more digits than Python reads
        raise InputError(name, "...", str(error), "use a smaller number") from None
    if not isinstance(raw, dict):
        raise InputError(name, raw, "not a JSON object", f'start with {{"format": "{wanted}", ...}}')
    if raw.get("format") != wanted:
        raise _other_kind(raw, wanted, name)
    try:
        return msgspec.convert(raw, kind, str_keys=True)
    except OverflowError:
        raise InputError(name, "...", "holds a number that is too large", "use a smaller number") from None
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and no text can hold
        raise InputError(name, "...", "holds a character that is no text", "remove the lone \\ud800 to \\udfff escapes") from None
    except msgspec.ValidationError as error:
        raise _prefixed(_explain(str(error), raw, kind), name) from None


def _other_kind(raw: dict[str, Any], wanted: str, name: str) -> InputError:
    """What to say of a file of another kind than ``wanted``."""
    found, noun = raw.get("format"), _noun(wanted)
    if found in FORMATS.values():
        return InputError(f"{name}: format", found, f"this is a {_noun(str(found))}, where a {noun} is asked for", f"give a {noun}")
    if "model_type" in raw or "_class_name" in raw:
        return InputError(
            f"{name}: format", found, f"this is a model's config, where a {noun} is asked for",
            "make a workload of it with `megatron-dip estimate --save-workload`",
        )
    return InputError(f"{name}: format", found, "not a known format and version here", f'use "{wanted}"')


def _noun(file_format: str) -> str:
    return file_format.split("/")[1]


def encode(value: msgspec.Struct) -> bytes:
    """JSON with a final newline; equal values give equal bytes."""
    return msgspec.json.encode(value) + b"\n"


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Writes several files; devices and pipes first, since these alone can still fail, and then no file is left."""
    for path in sorted(contents, key=lambda path: not path.exists() or path.is_file()):
        write_atomically(path, contents[path])


def save(path: str | Path, value: msgspec.Struct) -> None:
    """Writes a workload, profile, partition or plan; see :func:`write_atomically`."""
    write_atomically(path, encode(value))


def check_writable(path: str | Path, field: str) -> None:
    """Raises InputError if a file cannot be written there: to be asked before the work whose result it takes."""
    path = Path(path)
    if str(path) == STANDARD_INPUT:
        raise InputError(field, str(path), "stands for standard input, which nobody can write to", "name a file; /dev/stdout is standard output")
    if path.is_dir():
        raise InputError(field, str(path), "is a directory", "name a file")
    if not path.parent.is_dir():
        raise InputError(field, str(path), "its directory does not exist", f"create {path.parent} or name another file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(field, str(path), "cannot be written", "name a file that you may write")
    if path.exists() and not path.is_file():
        return
    try:  # as it will be written; what access() allows can still fail, in /proc for one
        handle, temporary = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.resolve().name}.")
        os.close(handle)
        os.unlink(temporary)
    except OSError as error:
        raise InputError(field, str(path), f"cannot be written ({error.strerror})", "name a file that you may write") from error


def check_outputs(outputs: Mapping[str, Path | None], inputs: Sequence[Path | None] = ()) -> None:
    """Raises InputError if one of the outputs cannot be written, or would overwrite an input or another output.

    Args:
        outputs: flag -> path; None: not asked for.
        inputs: files that are read.
    """
    given = {field: path for field, path in outputs.items() if path is not None}
    seen: dict[Path, str] = {}
    for field, path in given.items():
        check_writable(path, field)
        if path.exists() and not path.is_file():
            continue  # a pipe or /dev/null takes any number of outputs
        for source in inputs:
            if source is not None and source.exists() and path.exists() and path.samefile(source):
                raise InputError(field, str(path), "is an input of this command and would be overwritten", "name another file")
        target = path.resolve()
        if target in seen:
            raise InputError(field, str(path), f"is the file of {seen[target]} too", "name a file for each")
        seen[target] = field


def check_folder_writable(folder: str | Path, field: str) -> None:
    """Makes the folder and tries to write there. Raises InputError where that fails: to be asked before the work whose results it takes."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except OSError as error:
        raise InputError(field, str(folder), f"cannot be written ({error.strerror})", "name a folder that can be written") from error


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replaces the file as a whole: readers see the old bytes or the new ones, and an error leaves the old ones.

    What is no regular file (a pipe, /dev/stdout) is written straight to.
    """
    path = Path(path)
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        path.write_bytes(data)
        return
    target = path.resolve()  # a link stays a link
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _load(path: Path, kind: type[T]) -> T:
    return decode(read_file(path), kind, _name(path))


def _name(path: Path) -> str:
    """What messages call a file: its name, but of a device or a pipe the path, since "null" or "stdin" would tell nobody anything."""
    if str(path) == STANDARD_INPUT:
        return "standard input"
    return path.name if path.is_file() else str(path)


class _named_in:
    """Puts the file's name before the field of every InputError raised inside."""

    def __init__(self, path: Path) -> None:
        self.name = _name(path)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, InputError) and not error.field.startswith(f"{self.name}: "):
            raise _prefixed(error, self.name) from None


def _prefixed(error: InputError, name: str) -> InputError:
    return InputError(f"{name}: {error.field}", error.value, error.problem, error.remedy)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(twice, [value for key, value in pairs if key == twice], "the key stands twice in one object", "keep one of them")
    return result


def _excerpt(text: str | bytes, position: int) -> str:
    shown = text[max(0, position - 20) : position + 20]
    return shown if isinstance(shown, str) else shown.decode(errors="replace")


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (float,), "str": (str,), "bool": (bool,), "array": (list,), "object": (dict,), "null": (type(None),),
}


def _explain(message: str, raw: Any, kind: type[msgspec.Struct]) -> InputError:
    """Turns msgspec's message into field, value, problem and remedy."""
    problem, _, place = message.partition(" - at ")
    of_key = place.startswith("`key` in ")
    path = place.removeprefix("`key` in ").strip("`").removeprefix("$").removeprefix(".")
    if match := re.search(r"(?:unknown|missing required) field `(.+)`", problem):
        unknown = "unknown" in problem
        name = match.group(1)
        where, value = _find(path, raw, lambda found: isinstance(found, dict) and (name in found) == unknown)
        field = f"{where}.{name}" if where else name
        if unknown:
            return InputError(field, value[name] if isinstance(value, dict) else value, "unknown field", "remove it or correct its spelling")
        return InputError(field, None, "missing", "add it")
    if of_key:
        # The formats' keys are names or whole numbers, and every key of a JSON object can be a name.
        where, found = _find(path, raw, lambda found: any(_is_no_integer(key) for key in found))
        key = next((key for key in found or () if _is_no_integer(key)), None)
        return InputError(where, key, "is a key that is no whole number", "give whole numbers as keys")
    if match := re.search(r"Expected `(.+)`, got `(.+)`", problem):
        wanted, got = match.groups()
        types = _JSON_TYPES.get(got, (object,))
        where, value = _find(path, raw, lambda found: type(found) in types or types == (object,))
        return InputError(where or "the file", value, f"is of type {got}, not {wanted}", f"give a value of type {wanted}")
    where, value = _find(path, raw, lambda found: True)
    allowed = _allowed_values(path, kind)
    remedy = f"use one of {', '.join(map(repr, allowed))}" if allowed else "use a value that the format allows"
    return InputError(where or "the file", value, problem[:1].lower() + problem[1:], remedy)


def _is_no_integer(key: str) -> bool:
    return re.fullmatch(r"-?\d+", key) is None


def _allowed_values(path: str, kind: type[msgspec.Struct]) -> list[Any]:
    """The values of the enumeration at a path of msgspec; empty where there is none."""
    types: list[Any] = [msgspec.inspect.type_info(kind)]
    for step in [*_steps(path), None]:
        types = [member for found in types for member in (found.types if isinstance(found, msgspec.inspect.UnionType) else (found,))]
        if step is None:
            break
        following: list[Any] = []
        for found in types:
            if isinstance(found, msgspec.inspect.StructType):
                following.extend(field.type for field in found.fields if field.encode_name == step)
            elif isinstance(found, msgspec.inspect.DictType):
                following.append(found.value_type)
            elif isinstance(found, msgspec.inspect.ListType):
                following.append(found.item_type)
        types = following
    return [value for found in types if isinstance(found, msgspec.inspect.LiteralType) for value in found.values]


def _steps(path: str) -> list[str]:
    return re.findall(r"\[\.\.\.\]|\[\d+\]|[^.\[\]]+", path)


def _find(path: str, raw: Any, matches: Any) -> tuple[str, Any]:
    """The field that a path of msgspec means: ``[...]`` in it stands for any key of an object. First one whose value matches."""
    found: list[tuple[str, Any]] = [("", raw)]
    for step in _steps(path):
        following: list[tuple[str, Any]] = []
        for where, value in found:
            if step == "[...]" and isinstance(value, dict):
                following.extend((f"{where}.{key}" if where else key, item) for key, item in value.items())
            elif step.startswith("[") and isinstance(value, list):
                index = int(step[1:-1])
                following.extend((f"{where}{step}", item) for item in value[index : index + 1])
            elif isinstance(value, dict) and step in value:
                following.append((f"{where}.{step}" if where else step, value[step]))
        found = following
    return next(((where, value) for where, value in found if matches(value)), (path, None))
