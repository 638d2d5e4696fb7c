r"""LaTeX and Unicode as answers have them, in the few characters and commands that the parser knows.

After it: no $, \left, \displaystyle or spacing commands; \text and its kin are \text{...}; operators are + - * / ^ =
< <= > >= != ; thousands separators that can be nothing else are gone.
"""

import re

_CHARACTERS = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u2012": "-", "\u00d7": "*", "\u00b7": "*", "\u22c5": "*", "\u00f7": "/",
        "\u2044": "/", "\u03c0": "\\pi ", "\u221e": "\\infty ", "\u221a": "\\sqrt ", "\u2264": "<=", "\u2265": ">=",
        "\u2260": "!=", "\u00b0": "^\\circ ", "\u222a": "\\cup ", "\u2208": "\\in ", "\u00b1": "\\pm ",
        "\u2205": "\\emptyset ", "\u00b2": "^2", "\u00b3": "^3", "\u00bd": "\\frac{1}{2}", "\u00bc": "\\frac{1}{4}",
        "\u00be": "\\frac{3}{4}",
        "\uff0c": ",", "\uff08": "(", "\uff09": ")", "\u2019": "'", "\u00a0": "~", "\u202f": "~",
        "\u2009": "~", "\u03b8": "\\theta ", "\u03b1": "\\alpha ", "\u03b2": "\\beta ", "\u2248": "\\approx ",
    }
)  # fmt: skip

_COMMANDS = {
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "cdot": "*", "times": "*", "div": "/", "ast": "*",
    "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "ne": "!=", "neq": "!=",
    "lt": "<", "gt": ">", "left": "", "right": "", "big": "", "Big": "", "bigl": "", "bigr": "", "Bigl": "", "Bigr": "",
    "displaystyle": "", "textstyle": "", "limits": "", "quad": " ", "qquad": " ", "lvert": "|", "rvert": "|",
    "vert": "|", "mid": "|", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "varnothing": "\\emptyset",
    "degree": "^\\circ ", "colon": ":", "dots": "\\ldots ", "mathrm": "\\text", "textbf": "\\text", "mbox": "\\text",
    "textrm": "\\text", "textit": "\\text", "texttt": "\\text", "operatorname": "\\text", "hbox": "\\text",
    "mathbf": "\\text", "textsf": "\\text", "rm": "\\text", "lor": "\\text{ or }", "vee": "\\text{ or }",
    "land": "\\text{ and }", "wedge": "\\text{ and }", "sim": "~", "imath": "i", "exp": "\\exp",
    "nonumber": "", "thinspace": "", "bigcup": "\\cup", "mathit": "\\text", "dbinom": "\\binom", "tbinom": "\\binom",
}  # fmt: skip

_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL)
_EMPTY_TEXT = re.compile(r"\\text\s*\{\s*\}")
_GROUPED = re.compile(
    r"""(?<![\d.,'~])\d{1,3}(?:
        (?:\{,\}\d{3})+(?!\d) |             # LaTeX's comma that is no list's
        (?:(?:\\,|~|\\!|,\\!|\\\ )\d{3})+(?!\d) | # thin spaces
        (?:'\d{3})+(?!\d) |                  # Swiss
        (?:\ \d{3})+(?!\d)(?!\s*/)           # SI, but not the '1 234/567' of a mixed number
    )""",
    re.VERBOSE,
)
_DOTTED = re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3})+(?:,\d+)(?![\d.,])|(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,])")
_SPACING = re.compile(r"(?<!\\)\\[,!;: ]|~")  # not the line break of a matrix
_PERCENT = re.compile(r"(?<=[\d)}])\s*(?:\\text\s*\{\s*)?per ?cent\b(?:\s*\})?")
_LATEX_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")


def clean(text: str) -> str:
    """The text of an answer in the parser's spelling."""
    text = text.strip().translate(_CHARACTERS)
    whole = _BOXED.fullmatch(text)
    if whole:
        text = whole[1]
    text = _DOTTED.sub(lambda match: match[0].replace(".", "").replace(",", "."), text)
    text = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _LATEX_DECIMAL_COMMA.sub(".", text)
    text = _COMMAND.sub(lambda match: _COMMANDS.get(match[1], match[0]), text)
    text = _SPACING.sub(" ", text)
    text = text.replace("\\$", " dollar_sign ").replace("$", "").replace(" dollar_sign ", "$")
    text = _PERCENT.sub("%", text)
    text = text.replace("\\%", "%").replace("**", "^").replace("=<", "<=").replace("==", "=").replace("\\#", "")
    text = text.replace("\\(", "").replace("\\)", "").replace("\\[", "").replace("\\]", "").replace("\\_", "_")
    text = _EMPTY_TEXT.sub("", text)
    return text.strip().rstrip(".,;:").strip() if not text.strip().endswith("...") else text.strip()
