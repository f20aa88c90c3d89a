"""Is a question garbled? A trigram model of the experts' own questions tells, in any language.

"And how many bedrooms shouldixople?" holds a cue for the bedrooms and ends in a question mark, so a lexicon's
rules would pay for it. The model knows which words experts say in a row. A question is garbled if its least
likely step, from two words to the next or to the end, is less likely than in 98% of the experts' questions.
For this limit each fifth of the questions is scored by a model of the others.

What it costs: up to 2% of what experts would say is taken for garbled, and more of what a policy says in ways
of its own. Nobody can tell that a question broken off at a good place ("Is it worse?") was meant to go on.
"""
import re
from collections import Counter

import numpy as np

from lexicon import sentences, words

FEWEST = 200  # questions, without which there is no limit to speak of
_LEAD_IN = re.compile(r"^\W*[^\s,，:：]+(?: [^\s,，:：]+)?[,，:：]\s*")  # "Well, "


def split(question):
    """Words of a question without its lead-in; digits are alike."""
    return [re.sub(r"\d", "0", word) for word in words(_LEAD_IN.sub("", question))]


def trigrams(questions):
    """A model of these questions (Witten-Bell smoothing) -> chance(question): that of its least likely step.

    A word that only one question holds counts as any word.
    """
    held_by = Counter(word for question in questions for word in set(split(question)))
    seen, total, kinds = Counter(), Counter(), Counter()

    def steps(question):  # ((the two words before, word) ...) up to the end
        known = [word if held_by[word] > 1 else None for word in split(question)]
        padded = ["", "", *known, ""]
        return zip(zip(padded, padded[1:]), padded[2:])

    for question in questions:
        for before, word in steps(question):
            for context in (before, before[1:], ()):
                kinds[context] += (context, word) not in seen
                seen[context, word] += 1
                total[context] += 1

    def step(before, word):
        shorter = step(before[1:], word) if before else 1 / len(held_by)
        if before not in total:
            return shorter
        return (seen[before, word] + kinds[before] * shorter) / (total[before] + kinds[before])

    return lambda question: min(step(*at) for at in steps(question))


def learn(texts):
    """Experts' utterances -> garbled(text): is one of its questions garbled? None: too few questions."""
    asked = [sentence for text in texts for sentence, is_question in sentences(text) if is_question]
    if len(asked) < FEWEST:
        return None
    found = []
    for fold in range(5):
        others = [question for i, question in enumerate(asked) if i % 5 != fold]
        found += map(trigrams(others), asked[fold::5])
    limit, chance = np.quantile(found, 0.02), trigrams(asked)
    return lambda text: any(asks and chance(sentence) < limit for sentence, asks in sentences(text))
