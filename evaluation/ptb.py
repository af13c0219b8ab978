"""The words of a caption, cut as Stanford's PTBTokenizer 3.4.1 cuts them for the COCO caption metrics.

That program is a longest-match lexer (its PTBLexer.flex, 2014): of all rules the one that reaches furthest wins, the
first of equals, and what a rule wants to see behind its token counts as reached. RULES are the ones a caption can
meet, written anew; `python tests/tools/eval_faults.py --only ptb` counts on how many captions the two agree.
"""

import re
import unicodedata

# What coco-caption's ptbtokenizer.py throws away. It lists -LRB- and its like as well, but in capitals, and sees only
# lower case: "-lrb-" stays, as a word of the caption.
DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

SPACE = r"[ \t\u00a0\u2000-\u200a\u3000]"
LETTER, ALNUM = r"(?:[^\W\d_]|[\u00ad\u0300-\u036f])", r"[^\W_]"
WORD = rf"{LETTER}(?:{LETTER}|\d)*(?:[.!?]{LETTER}(?:{LETTER}|\d)*)*"
APOSTROPHE = r"(?:['\x92\u2019]|&apos;)"
MARK = rf"(?:{APOSTROPHE}|[`\x91\u2018\u201b])"  # what stands for an apostrophe, rightly or wrongly
TAIL = rf"{APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"  # the 's of dog's
NOT = rf"[nN]{MARK}[tT]"
NUM = r"(?:\d+(?:[.:,\u00ad]\d+)+|\d*(?:[.,]\d+)+|\d+)"
PART = rf"(?:[dDoOlL]{MARK}{ALNUM})?{ALNUM}+"
POINTED = r"(?:\d+(?:[.:,\u00ad]\d+)+|(?:[.,]\d+)+)"  # no PART: were there two ways to read "1-1-1", 2^n would be tried
THING = rf"(?:{PART}|[-+]{NUM}|{POINTED})(?:[-_\u058a\u2010\u2011](?:{PART}|{POINTED}))*"
SLASHED = rf"{ALNUM}+(?:-[A-Za-z]+){{0,2}}(?:\\?/{ALNUM}+(?:-[A-Za-z]+){{0,2}}){{1,2}}"
HYPHENED = r"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:[A-Za-z0-9\u00ad]+(?:\.\d+)?|[A-Za-z](?:\.[A-Za-z])+\.))+"
ACRONYM = r"[A-Za-z](?:\.[A-Za-z])*"
URL = r"""(?:https?://[^\s"<>|()]+[^\s"<>|.!?(){},-]|(?:www\.(?:[^\s"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"""
URL += r"""|(?:[^\s"`'<>|.!?(){},_$/:-]+\.)+(?:com|net|org|edu))(?:/[^\s"<>|()]+[^\s"<>|.!?(){},-])?)"""
ODD = rf"{APOSTROPHE}n{APOSTROPHE}?|[lLdDjJ]{APOSTROPHE}|(?i:dunkin|somethin|ol){APOSTROPHE}|{APOSTROPHE}(?i:em)"
ODD += rf"|[A-HJ-XZn]{MARK}[^\W\d_]{{2,}}|{APOSTROPHE}[2-9]0[sS]|{APOSTROPHE}(?i:till?|cause)"
ODD += rf"|[^\W\d_]+[aeiouyAEIOUY]{MARK}[aeiouA-Z][^\W\d_]*"
ODD += r"|(?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)"


def caseless(words: str) -> str:
    """Alternatives in any case, but for a first letter in brackets: "Mass." is a state, "mass." ends a sentence."""
    parts = words.replace("\n", "").split("|")
    return "|".join(f"{w[1]}(?i:{w[3:]})" if re.match(r"\[[A-Z]\]", w) else f"(?i:{w})" for w in parts)


# Abbreviations keep their full stop. Those of the first list also end sentences.
SHORT = caseless(r"""
Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|Mon|Tue|Tues|Wed|Thu|Thurs|Fri|Ala|Ariz|[A]z|[A]rk|Calif|Colo|Conn|Ct|
Dak|[D]el|Fla|Ga|[I]ll|Ind|Kans?|Ky|[L]a|[M]ass|Md|Mich|Minn|[M]iss|Mo|Mont|Neb|Nev|Okla|[O]re|[P]a|Penn|Tenn|[T]ex|Va|
Vt|[W]ash|Wisc?|Wyo|Inc|Cos?|Corp|Pp?tys?|Ltd|Plc|Bancorp|Bhd|Assn|Univ|Intl|Sys|tel|est|ext|sq|Jr|Sr|Bros|Ed\.D|Ph\.D|
Esq|etc|al|seq""")
TITLE = caseless(r"""
Mr|Mrs|Ms|[M]iss|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Capt|Ste?|Ave|Pres|
Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme|Msgr|Sfc|vs|Alex|Wm|Jos|Cie|a\.k\.a|
cf|TREAS|Ph|Invt|Elec|Natl|M[ft]g|Dept|Blvd|Rd""")
NUMBERED = "(?i:ca|figs?|prop|nos?|sect?s?|arts?|bldg|pp|op)"  # abbreviations before a number only
STOP = r"[,;:\u3001]"
STARTS = "About|According|Additionally|After|An?|As|At|But|Earlier|Her?|Here|However|If|In|It|Last|Many|More|M[rs]\\."
STARTS += "|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|When|While|What"
STARTS += "|Yet|You"


def straight(token: str) -> str:
    return re.sub(MARK, "'", token)


def bracketed(token: str) -> str:
    return token.replace("(", "-lrb-").replace(")", "-rrb-")


# (token, what must stand behind it, what becomes of it: itself, two pieces, another text), in the order they have there
RULES = [
    (rf"(?i:cannot|{APOSTROPHE}twas)", "", 3),  # how many letters of it are the second word
    (r"[cC]\+\+|[cCfF]#", "", None),
    (r"</?[A-Za-z!?][^>\n]*>", "", None),
    (r"(?i:gonna|gotta|lemme|gimme|wanna)|(?:'|\u2019)(?i:tis)", "", 2),
    (r"&(?:MD|mdash|ndash);|[\x96\x97\u2013-\u2015]", "", "--"),
    (r"&amp;", "", "&"),
    (r"[\u00bc-\u00be\u2153-\u215e]", "", lambda token: unicodedata.normalize("NFKC", token).replace("\u2044", "/")),
    (WORD, TAIL, None),
    (r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", NOT, None),
    (WORD, "", None),
    (ODD, "", None),
    (rf"[yY]{APOSTROPHE}", r"[^\W\d_]", None),
    (URL, "", None),
    (r"[a-zA-Z0-9][^\s\"<>|()\u00a0{}]*@(?:[^\s\"<>|(){}.\u00a0]+\.)*[^\s\"<>|(){}.\u00a0]+", "", None),
    (r"@[A-Za-z_]\w*|#[^\W\d_]\w*[^\W_]", "", None),
    (TAIL, "[^A-Za-z]", straight),
    (NOT, "[^A-Za-z]", straight),
    (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", "", None),
    (rf"[-+]?{NUM}", "", None),
    (r"(?:\d{1,4}[- ])?\d{1,4}(?:\\?/|\u2044)\d{1,4}", "", None),
    (rf"pro-|anti-|Cap{APOSTROPHE}n|c{APOSTROPHE}est", "", None),
    (SLASHED, "", None),
    (r"[A-Z]*\$|#", "", None),
    (r"[\u00a2-\u00a4\u20ac]", "", {"\u00a2": "cents", "\u00a3": "#"}.get),
    (r"[A-Za-z]", rf"\.{SPACE}+(?:{STARTS})[\s?!]", None),
    (rf"{NUMBERED}\.", rf"{SPACE}?\d", None),
    (rf"(?:{SHORT})\.", "", None),
    (rf"(?:{TITLE}|{ACRONYM})\.", "", None),
    (rf"(?:{TITLE}|{ACRONYM})", SPACE, None),
    (rf"{APOSTROPHE}\d\d", r"\s", None),
    (rf"{WORD}\.", STOP, None),
    (
        r"(?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])\d{3,4}[- \u00a0]?\d{3,5}",
        "",
        bracketed,
    ),
    (r'"|&quot;|\'\'', "", "''"),
    (r"<<|>>", "", None),
    (r"&lt;|<", "", "<"),
    (r"&gt;|>", "", ">"),
    (r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", r"[^A-Za-z0-9]", bracketed),
    (r"[()\[\]{}]", "", BRACKETS.get),
    (r"-{3,4}", "", "--"),
    (r"-+", "", None),
    (r"\.(?:\.\.+|[ \u00a0](?:\.[ \u00a0])+\.)|[\x85\u2026]", "", "..."),
    (r"@+|#+|_+|\*+|[,;:\u3001]|[?!]+|[.\u00a1\u00bf]|=|/", "", None),
    (rf"(?:{HYPHENED}|{THING})\.", STOP, None),
    (HYPHENED, "", None),
    (THING, "", None),
    (r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+", "", None),
    (rf"{APOSTROPHE}|[`\u2018-\u201f\x91-\x94\u2039\u203a\u00ab\u00bb]{{1,2}}", "", "'"),
    (TAIL, "", straight),
    (NOT, "", straight),
    (r"[+%&~^|\\\u00a2-\u00a9\u00ac\u00ae-\u00ba\u00d7\u00f7\u2020-\u2044\u20a0-\u20bf\u2100-\u2bff]", "", None),
]
LEXER = [(re.compile(f"({token})(?:{behind})"), becomes) for token, behind, becomes in RULES]

# Most captions are words and spaces, perhaps with a full stop, and then all of this comes to `split`.
PLAIN = re.compile(r"[A-Za-z]+(?: +[A-Za-z]+)* *[.]? *")
KNOWN = re.compile(rf"(?:{SHORT}|{TITLE}|[A-Za-z])")
JOINED = re.compile(r"\b(?:cannot|gonna|gotta|lemme|gimme|wanna)\b", re.IGNORECASE)


def ptb_words(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation."""
    if PLAIN.fullmatch(caption) and not JOINED.search(caption):
        words = caption.split()
        if words[-1][-1] != ".":
            return caption.lower().split()
        last = words[-1][:-1]
        if last and not KNOWN.fullmatch(last):
            return [*map(str.lower, words[:-1]), last.lower()]
    return [token for token in map(str.lower, tokens(" ".join(caption.split()) + "\n")) if token not in DROPPED]


def tokens(line: str):
    """Every token of a line, which ends in a line break: rules look behind their tokens."""
    at = 0
    while at < len(line):
        matches = [(match, becomes) for rule, becomes in LEXER if (match := rule.match(line, at))]
        if not matches:
            at += 1  # a space, or a character that no rule knows
            continue
        match, becomes = max(matches, key=lambda pair: pair[0].end())  # the first of equals
        token, at = match[1], match.end(1)
        if isinstance(becomes, int):
            yield token[:-becomes]
            yield token[-becomes:]
        elif callable(becomes):
            yield from (becomes(token) or "$").split()
        else:
            yield from (token.replace("\u00ad", "") if becomes is None else becomes).split()
