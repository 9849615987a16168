"""Rewards: plain callables ``(prompts, completions, **columns) -> list[float]``, as TRL has them, and reward models by their folder.

Prompts and completions are strings, or lists of messages where the data are conversational. ``columns`` are the other columns of the
prompts' rows, one entry for each completion. ``None`` says that a function has nothing to say about a completion.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import math
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ingot.data.rows import Content
from ingot.errors import ConfigError, RunError
from ingot.inference.scoring import RewardModel, is_reward_folder

RewardFunction: TypeAlias = Callable[..., Any]

TIMEOUT_S = 600.0
"""Most seconds of one call of a reward function unless given."""


class RewardError(RunError):
    """A reward function did something else than giving a number for each completion."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rewards:
    """What the functions gave."""

    total: npt.NDArray[np.float64]
    """Weighted sum over the functions that apply, f64 [S]; NaN where none does."""
    each: npt.NDArray[np.float64]
    """f64 [S, F]; NaN where a function does not apply."""
    names: tuple[str, ...]
    """[F]"""

    def metrics(self) -> dict[str, float]:
        """``rewards/NAME/mean`` and ``rewards/NAME/std`` over the completions it applies to (0 where none); names as in TRL."""
        found: dict[str, float] = {}
        for name, column in zip(self.names, self.each.T, strict=True):
            there = column[~np.isnan(column)]
            found[f"rewards/{name}/mean"] = float(there.mean()) if there.size else 0.0
            found[f"rewards/{name}/std"] = float(there.std(ddof=1)) if there.size > 1 else 0.0
        return found


class RewardFunctions:
    """One or more reward functions with weights.

    Parameters
    ----------
    functions
        Callables (a :class:`~ingot.inference.scoring.RewardModel` is one), or texts that :func:`load_reward` understands.
    weights
        One for each; 1 unless given.
    timeout_s
        Most seconds of a call; None waits for ever. A function that takes longer is left behind in a thread of its own, which ends with
        the process; the caller is free to save. With None, functions run in the caller's thread, as those that use signals need.
    place
        Where reward models are computed: see :func:`load_reward`.

    Raises
    ------
    ConfigError
        A function cannot be loaded, or the weights do not fit.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction | str],
        weights: Sequence[float] | None = None,
        *,
        timeout_s: float | None = TIMEOUT_S,
        place: Mapping[str, Any] | None = None,
    ) -> None:
        if not functions:
            raise ConfigError("no reward was given: name at least one, such as --reward ./my_reward.py:score")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions):
            raise ConfigError(
                f"reward_weights has {len(weights)} numbers for {len(functions)} rewards: give one for each"
            )
        for weight in weights:
            if not math.isfinite(weight):
                raise ConfigError(f"reward_weights holds {weight}: give finite numbers")
        if timeout_s is not None and not timeout_s > 0:
            raise ConfigError(f"the timeout of rewards must be above 0 seconds, got {timeout_s}")
        self._functions = [load_reward(each, **(place or {})) if isinstance(each, str) else each for each in functions]
        self._places = [
            each if isinstance(each, str) else getattr(each, "__name__", type(each).__name__) for each in functions
        ]
        self._weights = np.array(weights, np.float64)
        self._timeout_s = timeout_s
        self.names = _distinct_names(self._functions, self._places)
        """What each is called in metrics."""

    def __call__(
        self,
        prompts: Sequence[Content],
        completions: Sequence[Content],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Rewards:
        """Rewards of completions.

        Raises
        ------
        RewardError
            A function raised, took too long, or returned something else than one finite number or None for each completion.
        """
        named = {**(columns or {}), "prompts": list(prompts), "completions": list(completions)}
        each = np.full((len(completions), len(self._functions)), np.nan)
        if len(completions):
            for number, (function, place) in enumerate(zip(self._functions, self._places, strict=True)):
                result = self._call(function, _arguments(function, place, named), place)
                each[:, number] = _checked(result, completions, place)
        applies = ~np.isnan(each)
        total = np.where(applies, each, 0.0) @ self._weights
        return Rewards(np.where(applies.any(axis=1), total, np.nan), each, self.names)

    def _call(self, function: RewardFunction, arguments: dict[str, Any], place: str) -> Any:
        outcome: list[tuple[Any, BaseException | None]] = []

        def work() -> None:
            try:
                result = function(**arguments)
                if inspect.isawaitable(result):
                    import asyncio

                    result = asyncio.run(_awaited(result))
                # A generator does its work while it is read.
                outcome.append((list(result) if inspect.isgenerator(result) else result, None))
            except BaseException as error:  # SystemExit too: a reward function does not end the run
                outcome.append((None, error))

        if self._timeout_s is None:
            work()
        else:
            thread = threading.Thread(target=work, name=f"reward {place}", daemon=True)
            thread.start()
            thread.join(self._timeout_s)
            if not outcome:
                raise RewardError(
                    f"reward {place}: took longer than {self._timeout_s:g} s for {len(arguments.get('completions', ()))} completions: "
                    "make it faster, or raise reward_timeout"
                )
        result, error = outcome[0]
        if isinstance(error, KeyboardInterrupt):
            raise error
        if error is not None:
            raise RewardError(f"reward {place}: raised {_raised(error)}") from error
        return result


async def _awaited(result: Any) -> Any:
    return await result


def completion_like(prompt: Content, text: str) -> Content:
    """An answer in the form of its prompt: a string, or the assistant's message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def load_reward(name: str, **place: Any) -> RewardFunction:
    """The function that ``./file.py:name``, ``package.module:name`` or ``package.module.name`` stands for, or the reward model of a folder.

    A folder (``runs/rm``) gives a :class:`~ingot.inference.scoring.RewardModel`; with several criteria its reward is the mean of
    their scores, or that of one (``runs/rm:helpful``). ``place`` says where it is computed, as in :func:`ingot.load_model`.

    Raises
    ------
    ConfigError
        There is no such file, module or name, it cannot be imported, or is no function; or the folder's model gives no scores.
    """
    if is_reward_folder(name):
        return RewardModel.load(name, **place)
    path, colon, attribute = name.rpartition(":")
    if not colon or "/" in attribute or "\\" in attribute:  # no colon, or that of a drive
        path, attribute = name, ""
    if path.endswith(".py") or "/" in path or "\\" in path:
        if not attribute:
            if not path.endswith(".py"):
                there = "holds no model" if Path(path).is_dir() else "no such folder"
                raise ConfigError(f"reward {name}: {there}; give the folder of a reward model, or ./file.py:FUNCTION")
            raise ConfigError(f"reward {name}: names no function; write {name}:FUNCTION")
        module = _module_of_file(path, name)
    else:
        if not colon:
            path, _, attribute = name.rpartition(".")
        if not path or not attribute:
            raise ConfigError(f"reward {name}: is no function; write ./file.py:FUNCTION or package.module.FUNCTION")
        module = _module_by_name(path, name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"reward {name}: {path} has no {attribute!r}{_functions_there(module, attribute)}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"reward {name}: {attribute} is a {type(found).__name__}, not a function")
    function: RewardFunction = found
    return function


def _module_of_file(path: str, name: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigError(f"reward {name}: {path}: {'a folder, not a file' if file.is_dir() else 'no such file'}")
    spec = importlib.util.spec_from_file_location(f"ingot_reward_{file.stem}_{abs(hash(file)):x}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"reward {name}: {path} is no Python file; give a .py file")
    module = importlib.util.module_from_spec(spec)
    # What lies beside the file can be imported by it; dataclasses look their module up here.
    _append_to_path(file.parent)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise ConfigError(f"reward {name}: {path} cannot be imported: {_raised(error)}") from error
    return module


def _module_by_name(path: str, name: str) -> ModuleType:
    _append_to_path(Path.cwd())
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and (path == error.name or path.startswith(error.name + ".")):
            raise ConfigError(
                f"reward {name}: there is no module {error.name}; for a file write ./file.py:FUNCTION"
            ) from None
        raise ConfigError(f"reward {name}: {path} cannot be imported: {_raised(error)}") from error
    except Exception as error:
        raise ConfigError(f"reward {name}: {path} cannot be imported: {_raised(error)}") from error


def _append_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _functions_there(module: ModuleType, wanted: str) -> str:
    names = [name for name, value in vars(module).items() if inspect.isroutine(value) and not name.startswith("_")]
    near = difflib.get_close_matches(wanted, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; functions there: {', '.join(names[:8])}" if names else ", and no other function"


def _distinct_names(functions: Sequence[RewardFunction], places: Sequence[str]) -> tuple[str, ...]:
    """The functions' own names; where two are the same, with the file or module, then with a number."""
    own = [getattr(function, "__name__", type(function).__name__) for function in functions]
    longer = [
        f"{Path(place.rpartition(':')[0]).stem}.{name}" if ":" in place else name
        for name, place in zip(own, places, strict=True)
    ]
    names = [full if own.count(name) > 1 else name for name, full in zip(own, longer, strict=True)]
    seen: collections.Counter[str] = collections.Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return tuple(distinct)


def _arguments(function: RewardFunction, place: str, named: dict[str, Any]) -> dict[str, Any]:
    """Of what there is, what the function takes: all if it has ``**columns``."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return {name: named[name] for name in ("prompts", "completions")}
    kinds = inspect.Parameter
    for parameter in parameters.values():
        optional = parameter.default is not kinds.empty or parameter.kind in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
        if parameter.kind is kinds.POSITIONAL_ONLY or (parameter.name not in named and not optional):
            there = ", ".join(name for name in named if name not in ("prompts", "completions"))
            raise RewardError(
                f"reward {place}: takes {parameter.name!r}, which the prompts have no column for (columns there: {there or 'none'}); "
                "write it as def NAME(prompts, completions, **columns)"
            )
    if any(parameter.kind is kinds.VAR_KEYWORD for parameter in parameters.values()):
        return named
    return {name: value for name, value in named.items() if name in parameters}


def _checked(result: Any, completions: Sequence[Content], place: str) -> npt.NDArray[np.float64]:
    """The numbers that a function returned, NaN for None, f64 [S]."""
    if result is None:
        raise RewardError(f"reward {place}: returned nothing; return a list with one number for each completion")
    if (
        isinstance(result, str | bytes | Mapping)
        or not hasattr(result, "__len__")
        or not hasattr(result, "__getitem__")
    ):
        raise RewardError(
            f"reward {place}: returned a {type(result).__name__}, not a list with one number for each completion"
        )
    try:
        values = list(result)
    except TypeError:  # arrays without dimensions
        raise RewardError(f"reward {place}: returned one number, not a list with one for each completion") from None
    if len(values) != len(completions):
        raise RewardError(
            f"reward {place}: returned {len(values)} rewards for {len(completions)} completions; return one for each"
        )
    numbers = np.full(len(values), np.nan)
    for index, value in enumerate(values):
        if value is None:
            continue
        number = _number(value)
        if number is None:
            raise RewardError(
                f"reward {place}: returned {_short(value)} (a {type(value).__name__}) for completion {index}, {_shown(completions[index])}; "
                "return a number, or None where it does not apply"
            )
        if not math.isfinite(number):
            raise RewardError(
                f"reward {place}: returned {number} for completion {index}, {_shown(completions[index])}; "
                "return a finite number, or None where it does not apply"
            )
        numbers[index] = number
    return numbers


def _number(value: Any) -> float | None:
    """What numpy, torch and Python call a number, as a float; None for what is none, such as the text of one."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _raised(error: BaseException) -> str:
    """An exception with the line of the file that raised it, as one line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if "importlib" not in frame.filename]
    if isinstance(error, SyntaxError):
        where = f" ({Path(error.filename or '?').name}, line {error.lineno})"
        return f"{type(error).__name__}: {error.msg}{where}"
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if words else ''}{words}{where}"


def _shown(completion: Content) -> str:
    return _short(completion if isinstance(completion, str) else "\n".join(each["content"] for each in completion))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
