"""Is a question garbled? A trigram model of the experts' own questions tells, in any language.

"And how many bedrooms shouldixople?" holds a cue for the bedrooms and ends in a question mark, so a lexicon's
rules would pay for it. The model knows which words experts say in a row and where they stop. A question that
no expert has put in these words is garbled, its lead-in ("Well, ") aside, if it holds a word that nobody in
the logs has said, or if its words on the mean, or its end, are less likely than in 98% of the experts'
questions.

What it costs: of questions by experts whose sessions it never saw, 0.3% are taken for garbled in the toy, up
to 2.4% where logs are small; but of wordings that no expert has used, 26% in the toy and 95% in a corpus with
93 wordings. So a policy is held to the experts' way of asking. `reward.wording: false` lets it find words of
its own. Nobody can tell that a question broken off at a good place ("Is it worse?") was meant to go on.
"""
import math
import re
from collections import Counter
from statistics import fmean

import numpy as np

from lexicon import sentences, words

FEWEST = 700  # questions: with 400 of them 4% of the experts' own would be taken for garbled
# "Well, "; the bounds keep the search linear
_LEAD_IN = re.compile(r"^\W{0,50}[^\s,，:：]{1,99}(?: [^\s,，:：]{1,99})?[,，:：]\s*")


def split(text):
    """Words of a text; digits are alike."""
    return tuple(re.sub(r"\d", "0", word) for word in words(text))


def questions_in(text, lex=None):
    """Each, also a request of the lexicon, without its lead-in."""
    return [split(_LEAD_IN.sub("", sentence)) for sentence, asks in sentences(text, lex) if asks]


def trigrams(questions):
    """A model of these questions ("stupid backoff", Brants et al. 2007) -> score(question).

    A score is the mean log-score of the words, and that of the end. A word of one question alone counts as
    any word.
    """
    held_by = Counter(word for question in questions for word in set(question))
    seen, total = Counter(), Counter()

    def steps(question):  # ((the two words before, word) ...) up to the end
        known = [word if held_by[word] > 1 else None for word in question]
        padded = ["", "", *known, ""]
        return zip(zip(padded, padded[1:]), padded[2:])

    for question in questions:
        for before, word in steps(question):
            for context in (before, before[1:], ()):
                seen[context, word] += 1
                total[context] += 1

    def chance(before, word):
        if seen[before, word]:
            return seen[before, word] / total[before]
        return 0.4 * chance(before[1:], word) if before else 1 / len(held_by)

    def score(question):
        *inside, end = [math.log(chance(*step)) for step in steps(question)]
        return fmean(inside or [0]), end

    return score


def learn(texts, heard=(), lex=None):
    """Experts' utterances (a list), and what else the logs say -> garbled(text): is a question in it garbled?

    None where the experts ask too little to learn from. lex: the lexicon whose requests are questions too.
    """
    asked = [question for text in texts for question in questions_in(text, lex)]
    if len(asked) < FEWEST:
        return None
    vocabulary = set().union(*map(split, (*texts, *heard)))
    usual, score = set(asked), trigrams(asked)
    least, least_end = np.quantile([score(question) for question in asked], 0.02, axis=0)

    def is_bad(question):
        inside, end = score(question)
        return inside < least or end < least_end or not vocabulary.issuperset(question)

    return lambda text: any(question not in usual and is_bad(question)
                            for question in questions_in(text, lex))
