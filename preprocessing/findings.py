"""What there is to say about a prepared data set before anything is trained: a verdict on every file, and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from preprocessing.concepts import trigger_pattern
from preprocessing.page import duration
from preprocessing.prepared import PreparedDataset, PreparedItem
from preprocessing.quality import BLURRED, near_duplicates
from preprocessing.rules import COMMON_SHARE, cleaned, common_fragments

LONGEST_CUT = 200  # characters of a caption's cut end that are shown


@dataclass(frozen=True)
class Read:
    """A caption as the base model reads it: how many tokens, of how many that it can take, and what that cuts off."""

    tokens: int
    limit: int
    cut: str
    trigger_kept: bool


Reader = Callable[[str], Read]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileVerdict(_Frozen):
    """A file of the upload: used as it is, fixed (`done` says how), rejected, or no picture (aside)."""

    source: str
    verdict: Literal["used", "fixed", "rejected", "aside"]
    done: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Bucket(_Frozen):
    """A trained size in pixels, how many pictures it has, and how many they count as with their repeats."""

    size: tuple[int, int]
    pictures: int
    weight: int


class Estimate(_Frozen):
    """What the training will cost, from a few real steps at the largest bucket."""

    steps: int
    runs: int = 1  # of that many steps: those of a cross-validation come on top
    measured_steps: int
    bucket: tuple[int, int]
    seconds_per_step: float
    peak_memory_mib: float
    memory_of: str  # "accelerator" or "process"
    seconds_total: float  # preparing, encoding, training and judging; without the pictures drawn at the end

    def planned(self) -> str:
        """How many steps, in words."""
        once = f"{self.steps} steps"
        return once if self.runs == 1 else f"{self.runs} runs (cross-validation of few pictures) with {once}"


class Findings(_Frozen):
    """What dataset.json holds."""

    counts: dict[str, int]
    files: tuple[FileVerdict, ...]
    buckets: tuple[Bucket, ...]
    near_duplicates: tuple[tuple[str, ...], ...]
    common_fragments: tuple[str, ...]
    warnings: tuple[str, ...]
    dataset_hash: str
    estimate: Estimate | None = None

    def told(self) -> str:
        """The findings in a few lines for a terminal."""
        lines = [", ".join(f"{count} {name}" for name, count in self.counts.items() if count)]
        lines += [f"{bucket.pictures} at {bucket.size[0]} x {bucket.size[1]} pixels" for bucket in self.buckets[:8]]
        lines += [f"warning: {warning}" for warning in self.warnings]
        if self.estimate:
            lines.append(
                f"{self.estimate.planned()} of {duration(self.estimate.seconds_per_step)}: "
                f"about {duration(self.estimate.seconds_total)} in all, "
                f"{self.estimate.peak_memory_mib:.0f} MiB of memory ({self.estimate.memory_of})"
            )
        return "\n".join(lines)


def examine(dataset: PreparedDataset, reader: Reader | None = None) -> Findings:
    """The findings about a data set; with `reader` the captions' length in the base model's tokens too."""
    firsts = {item.source: item for item in reversed(dataset.items)}
    names = sorted(firsts)
    hashes = [int(firsts[name].perceptual_hash or "0", 16) for name in names]
    # Of a picture of one colour the hash says nothing.
    told = [index for index, name in enumerate(names) if firsts[name].blur is not None]
    groups = [tuple(names[told[i]] for i in group) for group in near_duplicates([hashes[index] for index in told])]
    twins = {name: [other for other in group if other != name] for group in groups for name in group}
    used = [
        FileVerdict(
            source=name,
            verdict="fixed" if _fixes(firsts[name]) else "used",
            done=firsts[name].notes,
            warnings=tuple(_warnings(firsts[name], twins.get(name, []), dataset.triggers_of(firsts[name]), reader)),
        )
        for name in names
    ]
    files = [
        *used,
        *(FileVerdict(source=one.source, verdict="rejected", done=(one.reason,)) for one in dataset.rejects),
        *(FileVerdict(source=one.source, verdict="aside", done=(one.use,)) for one in dataset.asides),
    ]
    by_captioner = (item.original_caption for item in firsts.values() if item.caption_source != "user")
    shared = common_fragments([cleaned(line).text for line in by_captioner if line])
    verdicts = Counter(one.verdict for one in files)
    return Findings(
        counts={"files": len(files), "pictures": len(names), "crops": len(dataset.items)}
        | {verdict: verdicts[verdict] for verdict in ("used", "fixed", "rejected", "aside")},
        files=tuple(sorted(files, key=lambda one: one.source)),
        buckets=_buckets(dataset),
        near_duplicates=tuple(groups),
        common_fragments=shared,
        warnings=tuple(_summary(used, shared, groups)),
        dataset_hash=dataset.dataset_hash,
    )


def _fixes(item: PreparedItem) -> list[str]:
    """What was done to the picture itself; a mask beside it is no change of it."""
    return [note for note in item.notes if not note.startswith(("masked", "no face", "nothing of mask_prompt"))]


def _warnings(item: PreparedItem, twins: list[str], triggers: tuple[str, ...], reader: Reader | None) -> list[str]:
    warnings = []
    if item.blur is not None and item.blur >= BLURRED:
        warnings.append(f"looks blurred ({item.blur:.2f} of 1)")
    if any(note.startswith(("small:", "enlarged")) for note in item.notes):
        warnings.append("smaller than the trained size")
    if twins:
        more = f" and {len(twins) - 3} more" if len(twins) > 3 else ""
        warnings.append(f"nearly the same picture as {', '.join(twins[:3])}{more}")
    if any(note.startswith(("no face", "nothing of mask_prompt", "its mask is not used")) for note in item.notes):
        warnings.append("trained without the mask that was asked for")
    warnings += [f"the caption has no {one}" for one in triggers if not trigger_pattern(one).search(item.caption)]
    if item.caption_source not in ("user", "none") and item.original_caption is None:
        warnings.append("the captioner found no words")
    if reader is not None:
        read = reader(item.caption)
        if read.cut:
            warnings.append(
                f"caption of {read.tokens} tokens, {read.limit} are read; cut off: {read.cut[:LONGEST_CUT]!r}"
            )
        if not read.trigger_kept:
            warnings.append(f"{' and '.join(triggers)} lies in the part of the caption that is cut off")
    return warnings


def _buckets(dataset: PreparedDataset) -> tuple[Bucket, ...]:
    pictures = Counter(item.size for item in dataset.items)
    weights: Counter[tuple[int, int]] = Counter()
    for item in dataset.items:
        weights[item.size] += item.repeats
    ordered = sorted(pictures, key=lambda size: (-pictures[size], size))
    return tuple(Bucket(size=size, pictures=pictures[size], weight=weights[size]) for size in ordered)


def _summary(used: list[FileVerdict], shared: Sequence[str], groups: list[tuple[str, ...]]) -> list[str]:
    """One line for each kind of warning that pictures have."""
    kinds = {
        "looks blurred": "look blurred: sharp pictures teach more",
        "smaller than": "are smaller than the trained size",
        "caption of": "have captions whose end the base model does not read: shorten them",
        "the caption has no": "have captions without the trigger word",
        "trained without the mask": "are trained without the mask that was asked for",
        "the captioner found": "have no caption but the trigger word",
    }
    lines = []
    for beginning, text in kinds.items():
        count = sum(any(warning.startswith(beginning) for warning in one.warnings) for one in used)
        if count:
            lines.append(f"{count} of {len(used)} pictures {text}")
    lost = sum(any("lies in the part" in warning for warning in one.warnings) for one in used)
    if lost:
        lines.append(
            f"{lost} of {len(used)} captions lose the trigger word, which stands where nothing is read any more"
        )
    if groups:
        doubles = sum(len(group) - 1 for group in groups)
        lines.append(f"{doubles} pictures are near-duplicates of others, which then count more: keep the best of each")
    if shared:
        lines.append(
            f"{COMMON_SHARE:.0%} of the captions or more share {', '.join(map(repr, shared[:5]))}: if that belongs to "
            "the subject, caption_common strip takes it out"
        )
    return lines
