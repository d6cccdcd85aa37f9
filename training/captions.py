"""From a face's captions to the texts that training draws: sentences or tags, shuffles, packs of whole captions.

Standard library only. A tokenizer comes in as `count_tokens(texts) -> lengths`, start and end token included.
"""

import random
import re
import statistics
from collections.abc import Callable

KIND_SHARE = 0.8  # of the faces have to look like tags
MIN_TAGS = 3  # parts between commas
MAX_TAG_WORDS = 3  # at the median
MAX_VARIANTS = 4  # of a face: its captions as they are, and shuffles of them
SENTENCE_END = re.compile(r"""[.!?\u3002\uff01\uff1f]["'\u201d\u2019)\]]*(\s|$)""")
EMOTICON = re.compile(r"(?!.*[^\W\d_]{2}).{1,7}")  # ^_^  o_o  (o)_(o): short, and never two letters in a row


def split_tags(caption: str) -> list[str]:
    """The parts between commas."""
    return [part.strip() for part in caption.split(",") if part.strip()]


def are_tags(parts) -> bool:
    """Whether these are many short parts, as a tagger writes them, and no sentence."""
    words = [len(re.split(r"[\s_]+", part)) for part in parts]
    is_short = len(parts) >= MIN_TAGS and statistics.median(words) <= MAX_TAG_WORDS
    return is_short and not SENTENCE_END.search(", ".join(parts))


def kind_of(faces: list[tuple[str, ...]]) -> str:
    """What the captions of these faces are, decided for all alike: "tags" (lists with commas), "one tag each" or
    "sentences"; anything but sentences only if 80 % of the faces say so.
    """
    lists = sum(all(are_tags(split_tags(caption)) for caption in captions) for captions in faces)
    single = sum(are_tags(captions) and not any("," in caption for caption in captions) for captions in faces)
    if lists and lists >= KIND_SHARE * len(faces):
        return "tags"
    return "one tag each" if single and single >= KIND_SHARE * len(faces) else "sentences"


def tidy_tags(captions: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """Captions of a data set of tags: spaces for underscores, but not in emoticons; lone tags joined into one list.

    A sentence among the lists stays as it is.
    """
    if kind == "one tag each":
        captions = (", ".join(captions),)

    def tidy(tag: str) -> str:
        return tag if EMOTICON.fullmatch(tag) else tag.replace("_", " ").strip()

    return tuple(text if SENTENCE_END.search(text) else ", ".join(map(tidy, split_tags(text))) for text in captions)


def shuffles(captions: tuple[str, ...], keep: int, seed: str) -> list[str]:
    """Up to MAX_VARIANTS less len(captions) more texts with the same tags in another order, fixed by `seed`.

    Args:
        keep: this many tags stay in front.
    """
    lists = [split_tags(caption) for caption in captions if not SENTENCE_END.search(caption)]
    variants = dict.fromkeys(captions)
    for number in range(4 * MAX_VARIANTS if lists else 0):  # with few tags the same order comes up again
        tags = lists[number % len(lists)]
        moving = tags[keep:]
        random.Random(f"{seed} {number}").shuffle(moving)
        if len(variants) < MAX_VARIANTS:
            variants.setdefault(", ".join(tags[:keep] + moving))
    return list(variants)[len(dict.fromkeys(captions)) :]


def packs(captions: tuple[str, ...], count_tokens: Callable, limit: int, prefix: str = "") -> list[str]:
    """As many whole captions as `limit` tokens hold, starting from each caption in turn and going round.

    A caption that doesn't fit any more is passed over for a later one that does. A pack of one is the caption itself,
    even if that alone is too long.

    Args:
        prefix: stands before every pack, and takes its tokens, too.

    Returns one pack for each caption, in their order, with repetitions.
    """
    bodies = [caption.rstrip(" .,") or caption for caption in captions]
    *as_last, prefix_length = (length - 2 for length in count_tokens([*bodies, prefix]))
    with_comma = [length - 2 for length in count_tokens([f"{body}," for body in bodies])]  # a comma may join a "!"
    found = []
    for start in range(len(captions)):
        room, pack = limit - 2 - prefix_length, []
        for index in [*range(start, len(captions)), *range(start)]:
            if as_last[index] <= room:
                pack.append(index)
                room -= with_comma[index]
            elif index == start:
                break
        found.append(prefix + (captions[start] if len(pack) < 2 else ", ".join(bodies[index] for index in pack)))
    return found
