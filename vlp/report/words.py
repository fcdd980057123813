"""Numbers, times and reasons in words that a reader understands without the code."""

import math
from datetime import datetime

from vlp.types import Reason

MINUS = "\N{MINUS SIGN}"

# What happened, and what to do about it.
REASONS = {
    Reason.OK: ("The sample was used.", "Nothing to do."),
    Reason.PADDING: ("An empty place at the end of an epoch; no sample was lost.", "Nothing to do."),
    Reason.VIDEO_MISSING: ("The caption names a video file that is not there.", "Add the file or remove the caption."),
    Reason.VIDEO_EMPTY: ("The video file has no bytes.", "Copy or download it again."),
    Reason.VIDEO_BROKEN: ("The file cannot be read as a video, or none of its frames can.", "Download it again."),
    Reason.NO_VIDEO_STREAM: ("The file has sound but no pictures.", "Replace it with the version that has video."),
    Reason.VIDEO_TRUNCATED: ("The video ends before the frames that its header promises.", "Download it again."),
    Reason.CODEC_REFUSED: ("The video uses a codec that is not accepted.", "Convert it, for example to H.264."),
    Reason.LIMIT_EXCEEDED: ("The video has too many pixels, frames, seconds or bytes.", "Shorten or shrink it."),
    Reason.CAPTION_MISSING: ("The video has no caption.", "Write one or remove the video."),
    Reason.CAPTION_BROKEN: ("The caption is not readable text, or is too long.", "Save it as UTF-8, or shorten it."),
    Reason.CHECKSUM: ("The bytes changed after the shard was indexed.", "Copy the shard again or index it again."),
    Reason.READ_FAILED: ("The storage did not give the bytes, even after retries.", "Check the disk or the network."),
    Reason.DECODE_TIMEOUT: ("Decoding took too long and was stopped.", "Convert the video to smaller pictures."),
    Reason.DECODE_CRASH: ("The decoder crashed on this video.", "Convert the video or remove it."),
    Reason.DUPLICATE_KEY: ("Another sample has the same name; the first one is used.", "Rename one of the two."),
    Reason.NO_SOUND: ("The file has no sound that can be decoded.", "Replace it with the version that has sound."),
}

STAGES = {
    "prepare": "while the shards were made",
    "index": "while the shards were indexed",
    "train": "during training",
}

EXIT_CODES = {
    0: "done",
    65: "too many samples could not be used",
    70: "an error in the code",
    73: "the output could not be created",
    74: "storage failed after its retries",
    75: "stopped from outside, saved, can be continued",
    76: "the checkpoint could not be resumed",
    77: "another job holds the run's directory",
    78: "the configuration is wrong",
    79: "a loss was not a finite number",
    80: "the processes of the job stopped answering each other",
    81: "too many jumps of the loss",
    82: "progress was made but no valid checkpoint exists",
    83: "the copies of the model drifted apart",
}


def ending(code: int) -> str:
    """Return what an exit code means; shells report signal N as 128 + N, Python as -N."""
    number = -code if code < 0 else code - 128
    if code not in EXIT_CODES and 0 < number < 65:
        return f"stopped by signal {number}"
    return EXIT_CODES.get(code, "not a code of vlp")


def reason(name: str) -> tuple[str, str]:
    """Return what a `Reason` name in any case means, and what to do; unknown names come back as they are."""
    member = Reason.__members__.get(name.upper())
    return REASONS[member] if member is not None else (name.replace("_", " ") or "no reason given", "")


def count(value: float) -> str:
    """Write a whole number with separators: 1,234,567."""
    return f"{value:,.0f}"


def short(value: float) -> str:
    """Write a large number in at most four characters and a unit: 86.4 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def plain(value: float | None) -> str:
    """Write a measured number with about four significant digits, without trailing zeros: 0.0123, 2.31, 120, 1e-05."""
    if value is None:
        return "—"
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e4:
        return short(value)
    return f"{value:.4g}".replace("-", MINUS, 1) if value < 0 else f"{value:.4g}"


def score(value: float | None) -> str:
    """Write a similarity score with three decimals, so that a column lines up."""
    if value is None or not math.isfinite(value):
        return plain(value)
    return f"{value:.3f}".replace("-", MINUS)


def measure(value: float | None, unit: str) -> str:
    """Write a metric with its unit; percentages always have one decimal, so that columns line up."""
    if value is None or not math.isfinite(value):
        return plain(value)
    if unit == "%":
        return f"{value:.1f} %"
    return f"{plain(value)} {unit}".strip()


def duration(seconds: float | None) -> str:
    """Write a time span in its two largest units: 2 h 5 min."""
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.3g} s"
    for size, unit, next_size, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = int(seconds % size // next_size)
            return f"{int(seconds // size)} {unit}" + (f" {rest} {next_unit}" if rest else "")
    return ""


def when(iso: str) -> str:
    """Write an ISO 8601 time as 23 Nov 2026, 00:47 (and the zone where it is given)."""
    try:
        moment = datetime.fromisoformat(iso)
    except ValueError:
        return iso or "unknown"
    return f"{moment.day} {moment:%b %Y, %H:%M} {moment.tzname() or ''}".strip()


def share(part: float, whole: float) -> str:
    """Write a fraction as a percentage that is 0 % and 100 % only when it really is."""
    if whole <= 0:
        return "—"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return f"{percent:.1f} %" if percent < 99.95 or part >= whole else "> 99.9 %"


def title(key: str) -> str:
    """Write an identifier as a title: masked_tokens -> Masked tokens."""
    words = key.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def plural(number: float, noun: str) -> str:
    """Write a number and its noun: 1 clip, 1,200 clips."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"
