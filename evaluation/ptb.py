"""Tokenize captions as Stanford's PTBTokenizer 3.4.1 does for the COCO caption metrics.

That program is a longest-match lexer (its PTBLexer.flex, 2014): at each position the rule with the longest match wins;
of equally long matches, the first rule. The context that a rule requires behind its token counts as matched. RULES are
the rules that captions can meet, written anew; `python tests/tools/eval_faults.py --only ptb` counts the captions on
which both tokenizers agree.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import partial

# Tokens that coco-caption's ptbtokenizer.py drops. Its list also has -LRB- and the like, but in capitals, while tokens
# are in lower case by then: "-lrb-" stays a word of the caption.
DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

SPACE = r"[ \t\u00a0\u2000-\u200a\u3000]"
LETTER, ALNUM = r"(?:[^\W\d_]|[\u00ad\u0300-\u036f])", r"[^\W_]"
WORD = rf"{LETTER}(?:{LETTER}|\d)*(?:[.!?]{LETTER}(?:{LETTER}|\d)*)*"
PHONE = r"(?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])\d{3,4}[- \u00a0]?\d{3,5}"
APOSTROPHE = r"(?:['\x92\u2019]|&apos;)"
MARK = rf"(?:{APOSTROPHE}|[`\x91\u2018\u201b])"  # an apostrophe, or a quote used as one
CLITIC = rf"{APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"  # the 's of dog's
NOT = rf"[nN]{MARK}[tT]"
NUM = r"(?:\d+(?:[.:,\u00ad]\d+)+|\d*(?:[.,]\d+)+|\d+)"
PART = rf"(?:[dDoOlL]{MARK}{ALNUM})?{ALNUM}+"
# Never matches a PART: with two ways to match each piece of "1-1-1", backtracking would try 2^n of them.
POINTED = r"(?:\d+(?:[.:,\u00ad]\d+)+|(?:[.,]\d+)+)"
COMPOUND = rf"(?:{PART}|[-+]{NUM}|{POINTED})(?:[-_\u058a\u2010\u2011](?:{PART}|{POINTED}))*"
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
    """The alternatives in any case, except a first letter in brackets: "Mass." is a state, "mass." ends a sentence."""
    parts = words.replace("\n", "").split("|")
    return "|".join(f"{w[1]}(?i:{w[3:]})" if re.match(r"\[[A-Z]\]", w) else f"(?i:{w})" for w in parts)


# Abbreviations keep their full stop. Those in SHORT can also end a sentence.
SHORT = caseless(r"""
Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|Mon|Tue|Tues|Wed|Thu|Thurs|Fri|Ala|Ariz|[A]z|[A]rk|Calif|Colo|Conn|Ct|
Dak|[D]el|Fla|Ga|[I]ll|Ind|Kans?|Ky|[L]a|[M]ass|Md|Mich|Minn|[M]iss|Mo|Mont|Neb|Nev|Okla|[O]re|[P]a|Penn|Tenn|[T]ex|Va|
Vt|[W]ash|Wisc?|Wyo|Inc|Cos?|Corp|Pp?tys?|Ltd|Plc|Bancorp|Bhd|Assn|Univ|Intl|Sys|tel|est|ext|sq|Jr|Sr|Bros|Ed\.D|Ph\.D|
Esq|etc|al|seq""")
TITLE = caseless(r"""
Mr|Mrs|Ms|[M]iss|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Capt|Ste?|Ave|Pres|
Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme|Msgr|Sfc|vs|Alex|Wm|Jos|Cie|a\.k\.a|
cf|TREAS|Ph|Invt|Elec|Natl|M[ft]g|Dept|Blvd|Rd""")
NUMBERED = "(?i:ca|figs?|prop|nos?|sect?s?|arts?|bldg|pp|op)"  # abbreviations only if a number follows
STOP = r"[,;:\u3001]"
STARTS = "About|According|Additionally|After|An?|As|At|But|Earlier|Her?|Here|However|If|In|It|Last|Many|More|M[rs]\\."
STARTS += "|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|When|While|What"
STARTS += "|Yet|You"


straighten_quotes = partial(re.sub, MARK, "'")


def escape_brackets(token: str) -> str:
    return token.replace("(", "-lrb-").replace(")", "-rrb-")


# (token pattern, pattern required behind it, result), in the order of PTBLexer.flex. Result: None keeps the token, a
# string or function replaces it, a number splits off so many letters as a second token.
RULES = [
    (rf"(?i:cannot|{APOSTROPHE}twas)", "", 3),
    (r"[cC]\+\+|[cCfF]#", "", None),
    (r"</?[A-Za-z!?][^>\n]*>", "", None),
    (r"(?i:gonna|gotta|lemme|gimme|wanna)|(?:'|\u2019)(?i:tis)", "", 2),
    (r"&(?:MD|mdash|ndash);|[\x96\x97\u2013-\u2015]", "", "--"),
    (r"&amp;", "", "&"),
    (r"[\u00bc-\u00be\u2153-\u215e]", "", lambda token: unicodedata.normalize("NFKC", token).replace("\u2044", "/")),
    (WORD, CLITIC, None),
    (r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", NOT, None),
    (WORD, "", None),
    (ODD, "", None),
    (rf"[yY]{APOSTROPHE}", r"[^\W\d_]", None),
    (URL, "", None),
    (r"[a-zA-Z0-9][^\s\"<>|()\u00a0{}]*@(?:[^\s\"<>|(){}.\u00a0]+\.)*[^\s\"<>|(){}.\u00a0]+", "", None),
    (r"@[A-Za-z_]\w*|#[^\W\d_]\w*[^\W_]", "", None),
    (CLITIC, "[^A-Za-z]", straighten_quotes),
    (NOT, "[^A-Za-z]", straighten_quotes),
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
    (PHONE, "", escape_brackets),
    (r'"|&quot;|\'\'', "", "''"),
    (r"<<|>>", "", None),
    (r"&lt;|<", "", "<"),
    (r"&gt;|>", "", ">"),
    (r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", r"[^A-Za-z0-9]", escape_brackets),
    (r"[()\[\]{}]", "", BRACKETS.get),
    (r"-{3,4}", "", "--"),
    (r"-+", "", None),
    (r"\.(?:\.\.+|[ \u00a0](?:\.[ \u00a0])+\.)|[\x85\u2026]", "", "..."),
    (r"@+|#+|_+|\*+|[,;:\u3001]|[?!]+|[.\u00a1\u00bf]|=|/", "", None),
    (rf"(?:{HYPHENED}|{COMPOUND})\.", STOP, None),
    (HYPHENED, "", None),
    (COMPOUND, "", None),
    (r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+", "", None),
    (rf"{APOSTROPHE}|[`\u2018-\u201f\x91-\x94\u2039\u203a\u00ab\u00bb]{{1,2}}", "", "'"),
    (CLITIC, "", straighten_quotes),
    (NOT, "", straighten_quotes),
    (r"[+%&~^|\\\u00a2-\u00a9\u00ac\u00ae-\u00ba\u00d7\u00f7\u2020-\u2044\u20a0-\u20bf\u2100-\u2bff]", "", None),
]
LEXER = [(re.compile(f"({token})(?:{context})"), result) for token, context, result in RULES]

# Most captions are words and spaces, perhaps with a full stop at the end: `split` is enough, and 8 times as fast. Not
# plain are words that become two tokens, and a full stop that may belong to an abbreviation or an initial.
PLAIN_CAPTION = re.compile(
    r"(?!.*\b(?i:cannot|gonna|gotta|lemme|gimme|wanna)\b)(?:[A-Za-z]+ +)*"
    rf"(?!(?:{SHORT}|{TITLE}|[A-Za-z])\.)[A-Za-z]+ *\.? *"
)


def ptb_words(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation."""
    if PLAIN_CAPTION.fullmatch(caption):
        return caption.lower().replace(".", "").split()
    return [token for token in map(str.lower, tokens(" ".join(caption.split()) + "\n")) if token not in DROPPED]


def tokens(line: str) -> Iterator[str]:
    """Yield the tokens of a line. It must end in a line break, for rules that require white space behind a token."""
    position = 0
    while position < len(line):
        matches = [(match, result) for rule, result in LEXER if (match := rule.match(line, position))]
        if not matches:
            position += 1  # skip a space, or a character without a rule
            continue
        match, result = max(matches, key=lambda pair: pair[0].end())  # max returns the first of equals
        token, position = match[1], match.end(1)
        if isinstance(result, int):
            yield token[:-result]
            yield token[-result:]
        elif callable(result):
            yield from (result(token) or "$").split()
        else:
            yield from (token.replace("\u00ad", "") if result is None else result).split()
