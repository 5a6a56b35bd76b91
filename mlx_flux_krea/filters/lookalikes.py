"""The forms in which a prompt is judged: as it stands, as it looks, joined and turned round.

A filter that reads letters sees nothing in a word that is spelled with letters of other alphabets, with strokes through
it, with digits for letters, with its letters set apart, backwards or upside down. Each such spelling becomes one more
text to judge. Forms only add to the text as it stands: a prompt is withheld if any of them is.
"""

import re
import unicodedata

# --- generated ---
# Unicode's confusables.txt of 2020-02-13, 01:38:49 GMT, by docs/lookalikes.py
_LETTERS = {
    "a": (
        "\u01cd\u01ce\u0226\u0227\u0251\u0391\u03b1\u0410\u0430\u13aa\u15c5\u1e9a\u2376\u237a\ua4ee\uab7a"
        "\U000102a0\U00016f40\U0001d6a8\U0001d6c2\U0001d6e2\U0001d6fc\U0001d71c\U0001d736\U0001d756\U0001d770"
        "\U0001d790\U0001d7aa"
    ),
    "b": (
        "\u0180\u0182\u0183\u0184\u0253\u0392\u0411\u0412\u042c\u0432\u0462\u0463\u048c\u048d\u13cf\u13f4"
        "\u13fc\u1472\u1473\u15af\u15f7\ua4d0\ua7b4\U00010282\U000102a1\U00010301\U0001d6a9\U0001d6e3"
        "\U0001d71d\U0001d757\U0001d791"
    ),
    "c": (
        "\xa2\xc7\xe7\u023c\u025b\u03b5\u03f2\u03f5\u03f9\u0404\u0421\u0441\u0454\u04aa\u04ab\u0511\u13df"
        "\u1d04\u20a1\u20ac\u22f4\u2377\u2c88\u2c89\u2ca4\u2ca5\ua4da\uab9b\uabaf\U000102a2\U00010302"
        "\U00010415\U00010429\U0001043d\U0001051c\U000118ce\U000118e9\U000118f2\U0001d6c6\U0001d6dc\U0001d700"
        "\U0001d716\U0001d73a\U0001d750\U0001d774\U0001d78a\U0001d7ae\U0001d7c4\U0001f74c"
    ),
    "d": (
        "\xd0\u0110\u0111\u0189\u018c\u0256\u0257\u0501\u13a0\u13e7\u146f\u15de\u15ea\u20ab\ua4d2\ua4d3\ua77a"
        "\uab70"
    ),
    "e": (
        "\u011a\u011b\u0246\u0247\u0395\u0415\u0435\u04bd\u04bf\u0510\u13ac\u13cb\u1d9f\u2107\u212e\u22ff"
        "\u2d39\ua4f0\uab32\uab7c\U00010286\U00010401\U000118a6\U000118ae\U00016f2d\U0001d221\U0001d6ac"
        "\U0001d6e6\U0001d720\U0001d75a\U0001d794"
    ),
    "f": (
        "\u0191\u0192\u03dc\u0584\u15b4\u1d6e\u1e9d\ua4dd\ua798\ua799\uab35\U00010287\U000102a5\U00010525"
        "\U000118a2\U000118c2\U0001d213\U0001d7ca"
    ),
    "g": (
        "\u018d\u01e4\u01e5\u01e6\u01e7\u01f5\u0260\u0261\u050c\u050d\u0581\u13c0\u13f3\u13fb\u1d83\u1da2"
        "\ua4d6\uab90"
    ),
    "h": (
        "\u0126\u0127\u0266\u0397\u041d\u043d\u045b\u04a2\u04a3\u04bb\u04c7\u04c8\u04c9\u04ca\u0570\u13bb"
        "\u13c2\u13f2\u157c\u1d78\u210f\u2c67\u2c8e\ua4e7\ua695\uab8b\U000102cf\U0001d6ae\U0001d6e8\U0001d722"
        "\U0001d75c\U0001d796"
    ),
    "i": (
        "\u0131\u0196\u01cf\u01d0\u0268\u0269\u026a\u02db\u037a\u0399\u03b9\u0406\u0456\u04c0\u04cf\u13a5"
        "\u1d7b\u1d7c\u1fbe\u2373\u2378\u2c92\ua647\uab75\U000118c3\U0001d6a4\U0001d6ca\U0001d704\U0001d73e"
        "\U0001d778\U0001d7b2"
    ),
    "j": (
        "\u0248\u0249\u037f\u03f3\u0408\u0458\u0575\u13ab\u148d\ua4d9\ua7b2\uab7b\U0001d6a5"
    ),
    "k": (
        "\u0138\u0199\u039a\u041a\u043a\u049a\u049e\u13e6\u16d5\u20ad\u2c69\u2c94\ua4d7\ua740\U00010518"
        "\U0001d6b1\U0001d6eb\U0001d725\U0001d75f\U0001d799"
    ),
    "l": (
        "\u0141\u0142\u0197\u019a\u01c0\u026b\u026d\u05c0\u05d5\u05df\u0625\u0627\u0661\u0673\u06f1\u07ca"
        "\u13de\u14aa\u16c1\u2223\u23fd\u2cd0\u2cd1\u2d4f\ua4e1\ua4f2\uabae\ufd3c\ufd3d\ufe87\ufe88\ufe8d"
        "\ufe8e\uffe8\U0001028a\U00010309\U00010320\U0001041b\U00010443\U00010526\U000118a3\U000118b2"
        "\U00016f16\U00016f28\U0001d22a\U0001d6b0\U0001d6ea\U0001d724\U0001d75e\U0001d798\U0001e8c7\U0001ee00"
        "\U0001ee80"
    ),
    "m": (
        "\u028d\u039c\u03fa\u041c\u043c\u04cd\u13b7\u15f0\u16d6\u1d0d\u2c98\ua4df\U000102b0\U00010311"
        "\U0001d6b3\U0001d6ed\U0001d727\U0001d761\U0001d79b"
    ),
    "n": (
        "\u0146\u019d\u019e\u0273\u039d\u03b7\u0578\u057c\u1d70\u2c9a\ua4e0\U0001018e\U00010513\U0001d6b4"
        "\U0001d6c8\U0001d6ee\U0001d702\U0001d728\U0001d73c\U0001d762\U0001d776\U0001d79c\U0001d7b0"
    ),
    "o": (
        "\xd8\xf8\u0150\u019f\u01d1\u01d2\u01fe\u0275\u037b\u0398\u039f\u03b8\u03bf\u03c3\u03d1\u03f4\u03fd"
        "\u041e\u043e\u0472\u0473\u04e8\u04e9\u0555\u0585\u05e1\u0647\u0665\u06be\u06c1\u06d5\u06f5\u06ff"
        "\u07c0\u0966\u09e6\u0a66\u0ae6\u0b20\u0b66\u0be6\u0c02\u0c66\u0c82\u0ce6\u0d02\u0d20\u0d66\u0d82"
        "\u0e50\u0ed0\u101d\u1040\u10ff\u12d0\u13be\u13eb\u1d0f\u1d10\u1d11\u2183\u2184\u2296\u229d\u236c"
        "\u2c9e\u2c9f\u2d31\u2d41\u2d54\u3007\ua4db\ua4f3\ua74a\ua74b\uab3d\uab3e\uab3f\uab74\uab8e\uabbb"
        "\ufba6\ufba7\ufba8\ufba9\ufbaa\ufbab\ufbac\ufbad\ufcd9\ufee9\ufeea\ufeeb\ufeec\U00010292\U000102ab"
        "\U00010404\U00010423\U0001042c\U0001044b\U000104c2\U000104ea\U00010516\U000114d0\U000118b5\U000118c8"
        "\U000118d7\U000118e0\U0001d21a\U0001d6af\U0001d6b6\U0001d6b9\U0001d6c9\U0001d6d0\U0001d6d4\U0001d6dd"
        "\U0001d6e9\U0001d6f0\U0001d6f3\U0001d703\U0001d70a\U0001d70e\U0001d717\U0001d723\U0001d72a\U0001d72d"
        "\U0001d73d\U0001d744\U0001d748\U0001d751\U0001d75d\U0001d764\U0001d767\U0001d777\U0001d77e\U0001d782"
        "\U0001d78b\U0001d797\U0001d79e\U0001d7a1\U0001d7b1\U0001d7b8\U0001d7bc\U0001d7c5\U0001ee24\U0001ee64"
        "\U0001ee84\U0001f714"
    ),
    "p": (
        "\u01a5\u03a1\u03c1\u03f1\u0420\u0440\u13e2\u146d\u1d29\u1d7d\u2374\u2ca2\u2ca3\ua4d1\uabb2\U00010295"
        "\U0001d6b8\U0001d6d2\U0001d6e0\U0001d6f2\U0001d70c\U0001d71a\U0001d72c\U0001d746\U0001d754\U0001d766"
        "\U0001d780\U0001d78e\U0001d7a0\U0001d7ba\U0001d7c8"
    ),
    "q": (
        "\u02a0\u051b\u0563\u0566\u1d90\u2d55"
    ),
    "r": (
        "\u01a6\u024d\u027c\u027d\u0433\u0493\u13a1\u13d2\u1587\u1d26\u1d72\u1d73\u2c85\ua4e3\uab47\uab48"
        "\uab71\uab81\uaba2\U000104b4\U00016f35\U0001d216"
    ),
    "s": (
        "\u01bd\u0282\u0405\u0455\u054f\u13d5\u13da\u1d74\ua4e2\ua731\uabaa\U00010296\U00010420\U00010448"
        "\U000118c1\U00016f3a"
    ),
    "t": (
        "\u0163\u0166\u0167\u01ad\u01ae\u021a\u021b\u023e\u03a4\u03c4\u0422\u0442\u04ac\u04ad\u10a0\u13a2"
        "\u13bf\u1d75\u20ae\u22a4\u2361\u27d9\u2ca6\ua4d4\uab72\U00010297\U000102b1\U00010315\U000118bc"
        "\U00016f0a\U0001d6bb\U0001d6d5\U0001d6f5\U0001d70f\U0001d72f\U0001d749\U0001d769\U0001d783\U0001d7a3"
        "\U0001d7bd\U0001f768"
    ),
    "u": (
        "\u01d3\u01d4\u0244\u028b\u03c5\u054d\u057d\u1200\u13cc\u144c\u1d1c\u1d7e\u222a\u22c3\ua4f4\ua79f"
        "\uab4e\uab52\uab9c\U000104ce\U000104f6\U000118b8\U000118d8\U00016f42\U0001d6d6\U0001d710\U0001d74a"
        "\U0001d784\U0001d7be"
    ),
    "v": (
        "\u03bd\u0474\u0475\u05d8\u0667\u06f7\u13d9\u142f\u1d20\u2228\u22c1\u2d38\ua4e6\ua6df\uaba9\U00010197"
        "\U0001051d\U00011706\U000118a0\U000118c0\U00016f08\U0001d20d\U0001d6ce\U0001d708\U0001d742\U0001d77c"
        "\U0001d7b6\U0001f708"
    ),
    "w": (
        "\u026f\u0461\u047d\u051c\u051d\u0561\u13b3\u13d4\u1d21\u20a9\ua4ea\ua761\uab83\U000114c5\U0001170a"
        "\U0001170e\U0001170f\U000118e6\U000118ef"
    ),
    "x": (
        "\xd7\u03a7\u0425\u0445\u04b2\u1541\u157d\u166d\u166e\u16b7\u2573\u292b\u292c\u2a2f\u2a30\u2cac\u2d5d"
        "\ua4eb\ua7b3\U00010196\U00010290\U000102b4\U00010317\U00010322\U00010527\U000118ec\U0001d6be"
        "\U0001d6f8\U0001d732\U0001d76c\U0001d7a6"
    ),
    "y": (
        "\xa5\u01b4\u024e\u024f\u0263\u028f\u03a5\u03b3\u03d2\u0423\u0443\u04ae\u04af\u04b0\u04b1\u10e7\u13a9"
        "\u13bd\u1d8c\u1eff\u213d\u2ca8\ua4ec\uab5a\U000102b2\U000118a4\U000118dc\U00016f43\U0001d6bc"
        "\U0001d6c4\U0001d6f6\U0001d6fe\U0001d730\U0001d738\U0001d76a\U0001d772\U0001d7a4\U0001d7ac"
    ),
    "z": (
        "\u01b5\u01b6\u0224\u0225\u0290\u0396\u13c3\u1d22\u1d76\ua4dc\uab93\U000102f5\U000118a9\U000118c4"
        "\U000118e5\U0001d6ad\U0001d6e7\U0001d721\U0001d75b\U0001d795"
    ),
}  # fmt: skip
# --- end ---
_LOOKALIKES = str.maketrans({character: letter for letter, some in _LETTERS.items() for character in some})
# The table has some letters in one case alone: a small letter is taken for its capital. Not of the Russian alphabet,
# whose small letters the table has where they are alike
_CAPITALS = {c.lower(): letter for letter, some in _LETTERS.items() for c in some}
_SMALL = {c: letter for c, letter in _CAPITALS.items() if len(c) == 1 and not "\u0430" <= c <= "\u044f"}
_LOOKALIKES = str.maketrans(_SMALL) | _LOOKALIKES
_DIGITS = str.maketrans("013457@$!|", "oieastasil")  # and others that stand for letters
_AMONG = re.compile(r"[^\W\d_][013457@$!|]+[^\W\d_]")  # such a sign between two letters
_TURNED = str.maketrans("ɐɔǝɟƃɥᴉıɾʞɯɹʇʌʍʎundpbq", "acefghiijkmrtvwynupdqb")  # half round
_ONLY_TURNED = re.compile("[ɐɔǝɟƃɥᴉɾʞɯɹʇʌʍʎ]")
_FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"  # take room and show nothing
# LATIN SMALL LETTER O WITH STROKE, LATIN LETTER SMALL CAPITAL R: the letter in the name
_NAME = re.compile(
    r"(?:LATIN|MODIFIER|REGIONAL INDICATOR|NEGATIVE|SQUARED|CIRCLED|PARENTHESIZED|COMBINING)[A-Z ]*?"
    r"(?:LETTER|SYMBOL LETTER)(?: SMALL| CAPITAL)*(?: DOTLESS| OPEN| SCRIPT| INSULAR)?"
    r" ([A-Z])(?: WITH .*)?"
)
_APART = re.compile(r"(?<![^\W_])[^\W\d_](?:[\W_]+[^\W\d_](?![^\W_])){2,}")  # three or more single letters in a row
# Pairs of letters that are common in English; a text backwards has fewer of them than the text
_PAIRS = re.compile(
    "(?=he|in|er|an|re|on|at|en|nd|ti|or|te|of|ed|it|al|ar|st|nt|ng|ha|as|ou|io|le|ve|co|me|de|hi|ri|ro|ic|ne|ea|ra|ce|"
    "ch|ll|be|ma|ck|qu|sh|wh|ow|ay|ke|ey|th)"
)


def forms(text: str) -> list[str]:
    """Returns the different texts that a filter is asked about, the text itself first; no form is empty."""
    plain = normalised(text)
    folded = as_it_looks(_shown(unicodedata.normalize("NFC", text)))  # NFKC makes another letter of some
    found = [text, plain, *([folded] if folded != plain.casefold() else []), *_joined(folded), *_spelled(folded)]
    backwards = folded[::-1]
    if "\u202e" in text or _english(backwards) > _english(folded) + 1:
        found.append(backwards)
    if len(_ONLY_TURNED.findall(plain)) > 1:
        turned = plain.lower().translate(_TURNED)
        found += [turned, turned[::-1]]
    return [form for form in dict.fromkeys(found) if form.strip()]


def normalised(text: str) -> str:
    """Returns NFKC of a text, without invisible characters: zero-width ones, controls, variation selectors."""
    return unicodedata.normalize("NFKC", _shown(unicodedata.normalize("NFKC", text)))


def _shown(text: str) -> str:
    """Returns a text without its invisible characters, with single spaces."""
    return " ".join("".join(c for c in text if not _is_hidden(c)).split())


def as_it_looks(text: str) -> str:
    """Returns the text in lower case, without marks and strokes, with each letter as the Latin one that it looks like.

    Words of which some letter looks like no Latin one stay as they are: they are in another language.
    """
    return " ".join(_as_latin(word) for word in text.split(" "))


def _as_latin(word: str) -> str:
    looks = word.translate(_LOOKALIKES).casefold()  # capitals first: small ones may look like another letter
    bare = "".join(c for c in unicodedata.normalize("NFKD", looks) if not _is_mark(c))
    latin = "".join(letter(c) for c in bare.translate(_LOOKALIKES))
    is_latin = all(c.isascii() or not c.isalpha() for c in latin)
    return word.casefold() if not is_latin or all(map(_is_plain, word)) else latin


def _is_plain(c: str) -> bool:
    """Returns True for ASCII, and for letters as European languages write them: a base letter with a mark, sharp s."""
    if c.isalpha() and not c.isascii():
        return c == "\u00df" or ("\u00c0" <= c <= "\u017f" and unicodedata.normalize("NFD", c)[0].isascii())
    return not _is_mark(c) and letter(c) == c


def letter(c: str) -> str:
    """Returns the Latin letter, in lower case, that Unicode's name of a character says it is a form of; else `c`."""
    if c.isascii():
        return c
    match = _NAME.fullmatch(unicodedata.name(c, ""))
    return match[1].lower() if match else c


def _joined(text: str) -> list[str]:
    """The text with letters that stand apart put together, where there are any."""

    def join(match: re.Match) -> str:
        if any(map(_is_mark, match[0])):  # vowels of Indian scripts
            return match[0]
        return re.sub(r"[\W_]+", "", match[0])

    joined = _APART.sub(join, text)
    return [joined] if joined != text else []


def _spelled(text: str) -> list[str]:
    """The text with digits and signs inside of words as the letters that they stand for: m1ckey. 1 is i, or l."""
    if not _AMONG.search(text):
        return []
    both = (_DIGITS, _DIGITS | str.maketrans("1!", "ll"))
    words = text.split(" ")
    return [" ".join(word.translate(one) if _AMONG.search(word) else word for word in words) for one in both]


def _is_mark(c: str) -> bool:
    """True for accents, strokes and frames that are put over the letter before them."""
    return unicodedata.category(c).startswith("M")


def _english(text: str) -> int:
    return len(_PAIRS.findall(text))


def _is_hidden(c: str) -> bool:
    hidden = unicodedata.category(c) in ("Cf", "Cc", "Co", "Cn") and not c.isspace()
    return hidden or c in _FILLERS or "\ufe00" <= c <= "\ufe0f" or c >= "\U000e0000"
