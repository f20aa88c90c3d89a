"""The offline miniature: pharmacy logs, a lexicon, a tokenizer and a small base model, all made from a seed.

    python -m toy.world --out runs/toy/world --seed 0

writes train.jsonl and test.jsonl (1,600 and 400 sessions in the format of real logs, with the generator's
truth in "learned" and "asks"), lexicon.yaml (for the rules extractor and the rules grader) and base/, a
Hugging Face folder with a Qwen2 model of about half a million parameters. A rerun with the same seed and
the same code returns at once.

The experts. Each complaint has an ordered checklist whose later items depend on what the user said so far.
The expert asks the first item that is still open and stops when none is. The right decision is therefore a
function of what the conversation says. Like real experts on messengers, they also make small talk, ask
"Anything else?" or ask two things at once (INTERLUDES). Imitation copies all of that; only the users'
replies show what mattered.

The base model plays the paper's instruct model: it is fluent, has no strategy and hardly ever stops. Under
the policy's prompt each of its training turns has a manner drawn at random (MANNERS). Only the "attentive"
minority asks for an open item, in an arbitrary order, or stops when none is left. Under other system
prompts the base practises what a large model can do already: to be attentive throughout, and to say what is
known and what is missing. It learns which items belong to a complaint, and when; it never sees the expert's
order or an expert's session.
"""
import argparse
import functools
import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from tqdm import tqdm

import model as decoder
from prompts import load_prompt
from records import STOP, InputError, cli, write_json, write_jsonl, write_text

POLICY_PROMPT = Path(__file__).resolve().parent.parent / "prompts" / "policy_toy.md"
GOAL = "Know enough to advise."

# ----------------------------------------------------------------------------------------------- data tables
# "what people write | another way | ... :: what the lexicon looks for | ..." (regexes, whole words)

ATTRIBUTES = {
    "duration": ("How long have you had it? | Since when? | When did it start? | "
                 "How many days has it been going on? | For how long now? "
                 ":: how long | since when | when did it | how many days", {
        "today": "since this morning | it started today | only a few hours | I woke up with it | "
                 "it began this morning "
                 ":: this morning | started today | few hours | woke up with it",
        "two days": "for two days | about 2 days | since the day before yesterday | two days now | "
                    "a couple of days "
                    ":: two days | 2 days | day before yesterday | couple of days",
        "a week": "for a week | about a week | since last week | seven days or so | a week now "
                  ":: a week | last week | seven days",
        "a month": "for a month | about four weeks | since last month | more than a month | a month now "
                   ":: a month | four weeks | last month"}),
    "fever": ("Do you have a fever? | Any fever? | Is your temperature raised? | "
              "Have you measured a fever? | Are you running a temperature? "
              ":: fever | temperature", {
        "yes": "I have a fever | I feel feverish | my temperature is high | I am running a temperature | "
               "fever too "
               ":: have a fever | feverish | temperature is high | running a temperature | fever too",
        "no": "no fever | my temperature is normal | I do not have a fever | without any fever | "
              "I am not feverish "
              ":: no fever | temperature is normal | not have a fever | without any fever | not feverish"}),
    "phlegm": ("Do you bring up phlegm? | Is there any phlegm? | Are you coughing up mucus? | "
               "Is the cough wet? | Any phlegm coming up? "
               ":: any phlegm | up phlegm | up mucus | cough wet", {
        "yes": "I bring up phlegm | there is phlegm | it is a wet cough | I cough up mucus | lots of phlegm "
               ":: bring up phlegm | there is phlegm | wet cough | up mucus | lots of phlegm",
        "no": "no phlegm | it is a dry cough | nothing comes up | rather dry | there is no phlegm "
              ":: no phlegm | dry cough | nothing comes up | rather dry"}),
    "colour": ("What colour is the phlegm? | Which colour does it have? | What does the phlegm look like? | "
               "Is it clear or yellow? | What is its colour? "
               ":: colour | phlegm look | clear or yellow", {
        "clear": "the phlegm is clear | clear and thin | it is transparent | quite clear | white and clear "
                 ":: clear | transparent",
        "yellow": "it is yellow | yellow phlegm | a yellow green | thick and yellow | it looks yellow "
                  ":: yellow",
        "bloody": "there is blood in it | a bit of blood | it is bloody | some red streaks | "
                  "brown with blood "
                  ":: blood | bloody | red streaks"}),
    "night": ("Is it worse at night? | Does it bother you at night? | Is it bad at night? | "
              "Does it wake you up? | Is it worse when lying down? "
              ":: at night | wake you | lying down", {
        "yes": "it is worse at night | the nights are bad | it wakes me up | worse when lying down | "
               "bad at night "
               ":: worse at night | nights are bad | wakes me | lying down | bad at night",
        "no": "the nights are fine | not worse at night | I sleep well | same day and night | "
              "the nights are quiet "
              ":: nights are fine | not worse at night | sleep well | day and night | nights are quiet"}),
    "smoking": ("Do you smoke? | Are you a smoker? | Any cigarettes? | Have you ever smoked? | "
                "Is smoking a habit of yours? "
                ":: smok\\w* | cigarettes", {
        "yes": "I smoke | a pack a day | I am a smoker | ten cigarettes a day | I smoke a little "
               ":: i smoke | pack a day | a smoker | ten cigarettes",
        "no": "I do not smoke | never smoked | I am a non-smoker | I quit smoking | no cigarettes "
              ":: not smoke | never smoked | non-smoker | quit smoking | no cigarettes"}),
    "severity": ("How bad is it? | How strong is the pain? | Is it mild or severe? | "
                 "How much does it hurt? | How severe is it? "
                 ":: how bad | how strong | mild or | how much does | how severe", {
        "mild": "it is mild | not too bad | only a little pain | quite mild | bearable "
                ":: mild | not too bad | little pain | bearable",
        "strong": "it is strong | quite bad | it hurts a lot | rather strong | pretty bad "
                  ":: strong | quite bad | hurts a lot | pretty bad",
        "unbearable": "it is unbearable | I can not stand it | the worst ever | terrible pain | "
                      "simply unbearable "
                      ":: unbearable | not stand it | worst ever | terrible pain"}),
    "spreading": ("Is it spreading? | Does it move anywhere else? | Has it spread? | Is it getting bigger? | "
                  "Does it go beyond one spot? "
                  ":: spread\\w* | move anywhere | getting bigger | one spot", {
        "yes": "it is spreading | it moves further | it gets bigger | it spread a lot | larger every hour "
               ":: is spreading | moves further | gets bigger | spread a lot | larger every",
        "no": "it stays in one place | not spreading | it has not spread | only one spot | it stays put "
              ":: in one place | not spreading | not spread | one spot | stays put"}),
    "itching": ("Does it itch? | Is it itchy? | Any itching? | Do you feel like scratching? | "
                "Do you have to scratch? "
                ":: itch\\w* | scratch\\w*", {
        "yes": "it itches | it is itchy | I keep scratching | itches a lot | very itchy "
               ":: itches | is itchy | keep scratching | very itchy",
        "no": "it does not itch | no itching | not itchy | I never scratch | without itching "
              ":: not itch | no itching | not itchy | never scratch | without itching"}),
    "swelling": ("Is it swollen? | Any swelling? | Has it swollen up? | Do you see a swelling? | "
                 "Does it feel thick? "
                 ":: swollen | swelling | feel thick", {
        "yes": "it is swollen | it swelled up | there is a swelling | rather swollen | it puffed up "
               ":: is swollen | swelled | a swelling | rather swollen | puffed up",
        "no": "no swelling | it is not swollen | nothing swollen | it is flat | without swelling "
              ":: no swelling | not swollen | nothing swollen | is flat | without swelling"}),
    "nausea": ("Do you feel sick? | Any nausea? | Have you vomited? | Are you nauseous? | Did you throw up? "
               ":: sick | nause\\w* | vomit\\w* | throw up", {
        "yes": "I feel sick | I vomited | I am nauseous | I threw up | some nausea "
               ":: feel sick | i vomited | am nauseous | threw up | some nausea",
        "no": "no nausea | I do not feel sick | no vomiting | I did not throw up | not nauseous "
              ":: no nausea | not feel sick | no vomiting | not throw up | not nauseous"}),
    "stool": ("What is the stool like? | How does the stool look? | Is the stool hard or watery? | "
              "What are your bowel movements like? | How is your stool? "
              ":: stool | bowel", {
        "watery": "it is watery | like water | very loose | watery stool | loose and thin "
                  ":: watery | like water | loose",
        "hard": "it is hard | like pebbles | hard and dry | hard lumps | hard stool :: hard | pebbles",
        "black": "it is black | dark as tar | black stool | very dark | black and sticky "
                 ":: black | dark as tar | very dark"}),
    "trigger": ("What brings it on? | What makes it worse? | When does it get worse? | Is there a trigger? | "
                "What sets it off? "
                ":: brings it on | makes it worse | get worse | trigger\\w* | sets it off", {
        "food": "after meals | when I eat | spicy food | after eating | food does it "
                ":: after meals | i eat | spicy food | after eating | food does",
        "stress": "stress at work | when I am stressed | under stress | a lot of stress | stress mostly "
                  ":: stress | stressed",
        "cold": "cold air | in the cold | when it is cold | cold wind | cold weather "
                ":: cold air | the cold | is cold | cold wind | cold weather",
        "exercise": "when I run | after sport | during exercise | when I lift things | exercise mostly "
                    ":: when i run | sport | exercise | lift things"}),
    "medicine": ("What have you taken so far? | Have you tried any medicine? | "
                 "Which medicine did you take? | Are you taking anything for it? | "
                 "Did you take something already? "
                 ":: have you taken | any medicine | which medicine | taking anything | take something", {
        "nothing": "I took nothing | nothing so far | no medicine yet | I have not taken anything | "
                   "nothing yet "
                   ":: took nothing | nothing so far | no medicine | not taken | nothing yet",
        "aspirin": "I took aspirin | some aspirin | aspirin twice | one aspirin | aspirin yesterday "
                   ":: aspirin",
        "ibuprofen": "I took ibuprofen | some ibuprofen | ibuprofen twice | one ibuprofen | "
                     "ibuprofen yesterday "
                     ":: ibuprofen",
        "herbal tea": "only herbal tea | I drank some tea | tea with honey | ginger tea | a lot of tea "
                      ":: herbal tea | some tea | tea with honey | ginger tea"}),
    "age": ("How old are you? | What is your age? | How old is the patient? | "
            "Is it for a child or an adult? | May I ask your age? "
            ":: how old | your age | child or", {
        "child": "it is for my son | for my daughter | a child of five | for my little boy | he is six "
                 ":: my son | my daughter | a child | little boy | is six",
        "adult": "I am thirty | I am 35 | forty years old | I am an adult | in my forties "
                 ":: am thirty | am 35 | forty years | an adult | my forties",
        "senior": "I am seventy | I am 72 | eighty years old | retired already | in my seventies "
                  ":: am seventy | am 72 | eighty years | retired | my seventies"}),
    "coffee": ("Do you drink coffee? | Any coffee? | Do you have coffee in the evening? | "
               "Are you a coffee drinker? | Is coffee part of your day? "
               ":: coffee", {
        "yes": "I drink coffee | three coffees a day | lots of coffee | coffee all day | coffee every day "
               ":: i drink coffee | three coffees | lots of coffee | coffee all day | coffee every",
        "no": "no coffee | I do not drink coffee | only decaf | never coffee | I gave up coffee "
              ":: no coffee | not drink coffee | decaf | never coffee | gave up coffee"}),
    "allergies": ("Do you have any allergies? | Any allergies? | Are you allergic to anything? | "
                  "Is there any allergy? | Any allergies I should know about? "
                  ":: allerg\\w*", {
        "yes": "I am allergic to penicillin | allergic to nuts | a pollen allergy | I have allergies | "
               "allergic to dust "
               ":: am allergic | allergic to | pollen allergy | have allergies",
        "no": "no allergies | not allergic | I have no allergies | none that I know | without allergies "
              ":: no allergies | not allergic | none that i know | without allergies"}),
    "pregnancy": ("Are you pregnant? | Could you be pregnant? | Is there a pregnancy? | "
                  "Any chance of a pregnancy? | Are you expecting a baby? "
                  ":: pregnan\\w* | expecting", {
        "yes": "I am pregnant | in my fifth month of pregnancy | I am expecting | pregnant indeed | "
               "expecting a baby "
               ":: am pregnant | of pregnancy | am expecting | pregnant indeed | expecting a baby",
        "no": "I am not pregnant | no pregnancy | not expecting | certainly not pregnant | not pregnant "
              ":: not pregnant | no pregnancy | not expecting"}),
}
GENERIC = ("allergies", "pregnancy")  # fit any context: asked at times, never part of I*
CASUAL = ("age", "smoking", "duration", "medicine", "fever")  # what people mention whether it matters or not

# complaint: (how people put it :: what the lexicon looks for, the expert's checklist in order).
# "item ? earlier=value" stands for an item that is asked only where the earlier one has this value.
COMPLAINTS = {
    "cough": ("I have a cough | a bad cough | I keep coughing | coughing a lot | this cough bothers me "
              ":: a cough | bad cough | coughing | this cough",
              "duration, phlegm, colour ? phlegm=yes, night ? phlegm=no, smoking"),
    "sore throat": ("my throat hurts | sore throat | my throat is sore | a burning throat | "
                    "it hurts to swallow "
                    ":: throat | swallow",
                    "duration, fever, medicine ? fever=yes, swelling ? fever=no, smoking"),
    "headache": ("I have a headache | my head hurts | headache | a pounding head | my head aches "
                 ":: headache | my head | pounding head",
                 "severity, nausea, medicine ? nausea=yes, trigger ? nausea=no, night"),
    "stomach ache": ("my stomach hurts | stomach ache | my belly hurts | pain in my stomach | stomach cramps "
                     ":: stomach | belly",
                     "nausea, stool, fever ? nausea=yes, trigger ? nausea=no, severity"),
    "diarrhea": ("I have diarrhea | diarrhea | I run to the toilet all the time | upset bowels | the runs "
                 ":: diarrhea | toilet | upset bowels | the runs",
                 "stool, fever, medicine ? fever=yes, duration ? fever=no, age"),
    "heartburn": ("heartburn | I have heartburn | acid reflux | burning in my chest | acid comes up "
                  ":: heartburn | acid | my chest",
                  "trigger, night, medicine ? night=yes, coffee ? night=no, smoking"),
    "rash": ("I have a rash | red spots on my arm | a skin rash | my skin is all red | rash on my leg "
             ":: rash | red spots | my skin",
             "itching, spreading, fever ? spreading=yes, medicine ? spreading=no, age"),
    "runny nose": ("runny nose | my nose runs | I keep sneezing | my nose is blocked | sniffles "
                   ":: my nose | runny nose | sneezing | sniffles",
                   "duration, itching, trigger ? itching=yes, fever ? itching=no, colour"),
    "back pain": ("my back hurts | back pain | I have back pain | my lower back aches | a sore back "
                  ":: my back | back pain | lower back | sore back",
                  "severity, spreading, night ? spreading=yes, trigger ? spreading=no, age"),
    "earache": ("my ear hurts | earache | pain in my ear | I have an earache | my ear aches "
                ":: my ear | earache",
                "age, fever, swelling ? fever=yes, duration ? fever=no, severity"),
    "red eyes": ("my eyes are red | red eyes | burning eyes | my eyes hurt | my eyes are sore :: eyes",
                 "itching, trigger ? itching=yes, swelling ? itching=no, duration, medicine"),
    "insomnia": ("I can not sleep | insomnia | I lie awake | I can not fall asleep | trouble sleeping "
                 ":: not sleep | insomnia | lie awake | fall asleep | trouble sleeping",
                 "duration, coffee, night ? coffee=yes, trigger ? coffee=no, medicine"),
    "insect bite": ("an insect bit me | a wasp sting | I got stung | insect bite | a mosquito bite "
                    ":: insect | wasp | stung | mosquito",
                    "swelling, spreading ? swelling=yes, itching ? swelling=no, fever, age"),
    "toothache": ("my tooth hurts | toothache | I have a toothache | my tooth aches | pain in a tooth "
                  ":: tooth | toothache",
                  "severity, swelling, fever ? swelling=yes, night ? swelling=no, coffee"),
}

YES = ["yes", "yeah", "yep", "yes I do", "I think so", "sure"]
NO = ["no", "nope", "not really", "not at all", "no I don't", "I don't think so"]
OPENERS = ["how", "what", "when", "since", "for", "which", "do", "does", "did", "is", "are", "has", "have",
           "any", "could", "can", "may"]
GREETINGS = ["Hello", "Hi", "Good morning", "Hi there", "Good evening", "Hello, can you help me"]
SMALL_TALK = ["Thanks for asking", "Good question", "Let me think", "Well", "Okay", "Hm"]
DIGRESSIONS = ["Will it go away soon?", "Do you sell vitamins?", "My neighbour is such a nice man",
               "What a busy shop", "Is it serious?", "I read a lot about it", "The bus was late",
               "What do other people buy?", "I was at the market before", "My sister works here too",
               "Can I pay by card?", "It is raining outside", "I hope you can help me",
               "My friend had a fever last month", "My phone rang", "How much is that?"]
LEADS = ["Okay, ", "I see, ", "Thanks, ", "Alright, ", "Thank you, "]
ASIDES = ["Okay.", "I see.", "Thank you.", "Let me help you."]
INTERLUDES = ["One moment, please.", "Sorry, the connection was gone.", "I am looking it up.",
              "Sure, I am with you.", "That happens a lot these days.", "Let me write that down.",
              "I just had another customer."]
GENERIC_QUESTIONS = ["Anything else?", "Do you have any other symptoms?", "Can you tell me more?",
                     "Is there anything else I should know?", "What else can you tell me?"]
CLOSINGS = ["Take these tablets twice a day.", "I recommend this syrup.", "Try this cream for some days.",
            "Please see a doctor about that.", "Drink plenty of water and rest.", "These drops will help.",
            "I will give you a mild remedy.", "Use this spray every evening."]
PARTING = ["I have to go", "Forget it", "I will ask a doctor instead", "Never mind, goodbye",
           "That takes too long"]


def pieces(text):
    """'a | b :: c' -> (['a', 'b'], ['c'])."""
    said, cues = text.split("::")
    return [s.strip() for s in said.split("|")], [c.strip() for c in cues.split("|")]


def checklist(text):
    """'a, b ? a=x/y' -> [('a', None, ()), ('b', 'a', ('x', 'y'))]: b is asked where a is x or y."""
    items = []
    for item in text.split(", "):
        slot, _, condition = item.partition(" ? ")
        on, _, values = condition.partition("=")
        items.append((slot, on or None, tuple(values.split("/")) if on else ()))
    return items


QUESTIONS = {slot: pieces(ask) for slot, (ask, _) in ATTRIBUTES.items()}
PHRASES = {slot: {value: pieces(text) for value, text in values.items()}
           for slot, (_, values) in ATTRIBUTES.items()}
OPENINGS = {name: pieces(text) for name, (text, _) in COMPLAINTS.items()}
CHECKLISTS = {name: checklist(text) for name, (_, text) in COMPLAINTS.items()}
YES_NO = [slot for slot, values in PHRASES.items() if list(values) == ["yes", "no"]]


# --------------------------------------------------------------------------------------------- who says what

def open_items(complaint, known):
    """What is still missing, in the expert's order: unknown items whose condition the known values fulfil.

    >>> open_items("cough", {"duration": "today", "phlegm": "no"})
    ['night', 'smoking']
    """
    return [slot for slot, on, values in CHECKLISTS[complaint]
            if slot not in known and (on is None or known.get(on) in values)]


def patient(rng):
    """-> {complaint, truth: a value for every attribute, lower: writes without capitals and full stops}."""
    return {"complaint": rng.choice(list(COMPLAINTS)),
            "lower": rng.random() < 0.5,
            "truth": {slot: rng.choice(list(values)) for slot, values in PHRASES.items()}}


def styled(who, text):
    if who["lower"]:
        return text.lower()
    return text[0].upper() + text[1:] + ("" if text[-1] in "?.!" else ".")


def clause(rng, slot, value, typos=0.015):
    """One way of saying that the slot has this value; now and then two letters are swapped."""
    text = rng.choice(PHRASES[slot][value][0])
    if rng.random() < typos:
        word = max(text.split(), key=len)
        i = rng.randrange(len(word) - 1)
        text = text.replace(word, word[:i] + word[i + 1] + word[i] + word[i + 2:])
    return text


def facts(rng, who, slots):
    """What the user says about these slots: the parts of an utterance. -> [(text, {slot: value})]"""
    return [(clause(rng, slot, who["truth"][slot]), {slot: who["truth"][slot]}) for slot in slots]


def utterance(rng, who, parts):
    """[(text, {slot: value})] -> user messages: one message, or one for each part."""
    apart = len(parts) > 1 and rng.random() < 0.3
    messages = []
    for group in [[part] for part in parts] if apart else [parts]:
        texts = [text for text, _ in group]
        if len(group) > 1 and all(text[-1].isalnum() for text in texts):
            joint = ", " if texts[0] in GREETINGS + SMALL_TALK else rng.choice([", ", " and ", ", "])
            content = styled(who, joint.join(texts))
        else:
            content = " ".join(styled(who, text) for text in texts)
        learned = {slot: value for _, told in group for slot, value in told.items()}
        messages.append({"role": "user", "content": content, "learned": learned})
    return messages


def remark(rng, who, texts):
    """An utterance that tells nothing: one of the texts."""
    return utterance(rng, who, [(rng.choice(texts), {})])


def opening(rng, who, volunteered):
    """The first user utterance: perhaps a greeting, the complaint, and facts nobody has asked for."""
    parts = [(rng.choice(GREETINGS), {})] if rng.random() < 0.2 else []
    parts.append((rng.choice(OPENINGS[who["complaint"]][0]), {}))
    return utterance(rng, who, parts + facts(rng, who, volunteered))


def reply(rng, who, asked, extra=()):
    """The user says what was asked, then the extra slots. A bare yes or no answers only a single question."""
    parts = [(rng.choice(SMALL_TALK), {})] if rng.random() < 0.06 else []
    for slot in asked:
        if slot in YES_NO and len(asked) == 1 and rng.random() < 0.5:
            value = who["truth"][slot]
            bare = rng.choice(YES if value == "yes" else NO)
            parts = [(bare + ("." if extra else ""), {slot: value})]
        else:
            parts += facts(rng, who, [slot])
    return utterance(rng, who, parts + facts(rng, who, extra))


def volunteer(rng, who, known, n):
    """n slots to mention unasked: mostly open ones, at times beside the point. -> list of slots."""
    slots, known = [], dict(known)
    listed = [slot for slot, *_ in CHECKLISTS[who["complaint"]]]
    for _ in range(n):
        casual = [slot for slot in CASUAL if slot not in known and slot not in listed]
        beside = casual and rng.random() < 0.2
        candidates = casual if beside else open_items(who["complaint"], known)
        if candidates:
            slot = rng.choice(candidates)
            slots.append(slot)
            known[slot] = who["truth"][slot]
    return slots


def volunteer_beside(rng, who, known, asks):
    """A slot to mention beside the reply to these questions -> list of one slot, or none."""
    told = {**known, **{slot: who["truth"][slot] for slot in asks}}
    return [slot for slot in volunteer(rng, who, told, 1) if slot not in asks]


def decapitalised(text):
    return text[0].lower() + text[1:]


def question(rng, slots, leads=LEADS, share=0.2):
    """One question, or two in one utterance; this share of them starts with a lead-in."""
    asks = [rng.choice(QUESTIONS[slot][0]) for slot in slots]
    text = asks[0]
    if len(asks) == 2:
        joined = f"{asks[0][:-1]}, and {decapitalised(asks[1])}"
        text = f"{asks[0]} {asks[1]}" if rng.random() < 0.5 else joined
    return rng.choice(leads) + decapitalised(text) if rng.random() < share else text


# -------------------------------------------------------------------------------------------------- the logs

@dataclass
class Talk:
    """An expert's conversation with a user as it grows."""
    rng: random.Random
    who: dict  # the user, see patient()
    known: dict = field(default_factory=dict)  # {slot: value} that the user has told
    messages: list = field(default_factory=list)

    def say(self, content, asks=()):
        self.messages.append({"role": "assistant", "content": content, "asks": list(asks)})

    def hear(self, said):
        self.messages.extend(said)
        for message in said:
            self.known.update(message["learned"])

    def idle(self):
        """The expert asks for no item: a generic question or small talk, and what the user makes of it."""
        rng, who = self.rng, self.who
        generic = rng.random() < 0.4
        self.say(rng.choice(GENERIC_QUESTIONS if generic else INTERLUDES))
        told = volunteer(rng, who, self.known, 1) if rng.random() < (0.5 if generic else 0.2) else []
        if told:
            self.hear(reply(rng, who, [], told))
        else:
            self.hear(remark(rng, who, NO if generic else DIGRESSIONS + SMALL_TALK))

    def ask(self, missing):
        """The expert asks for the first open item, at times for two. -> the slots"""
        asks = missing[:2] if len(missing) > 1 and self.rng.random() < 0.15 else missing[:1]
        if self.rng.random() < 0.06:
            self.say(self.rng.choice(ASIDES))
        self.say(question(self.rng, asks), asks)
        return asks

    def answer(self, asks):
        """The user's reply to a question, at times with a fact beside it or one told before."""
        rng, extra = self.rng, []
        if rng.random() < 0.12:
            extra = volunteer_beside(rng, self.who, self.known, asks)
        elif self.known and rng.random() < 0.03:
            extra = [slot for slot in [rng.choice(list(self.known))] if slot not in asks]
        self.hear(reply(rng, self.who, asks, extra))

    def close(self):
        """Nothing is open any more: at times a generic item, mostly some advice."""
        rng = self.rng
        if rng.random() < 0.15:
            slot = rng.choices(GENERIC, [80, 20])[0]
            self.say(question(rng, [slot]), [slot])
            self.hear(reply(rng, self.who, [slot]))
        if rng.random() < 0.8:
            self.say(rng.choice(CLOSINGS))


def session(seed, split, number):
    """One expert conversation. It depends on the arguments alone: more sessions never change earlier ones."""
    rng = random.Random(f"{seed} {split} {number}")
    who = patient(rng)
    talk = Talk(rng, who)
    if rng.random() < 0.08:
        talk.say("Hello, how can I help you?")
    told = volunteer(rng, who, {}, rng.choices([0, 1, 2], [50, 35, 15])[0])
    talk.hear(opening(rng, who, told))
    patience = rng.randint(1, 2) if rng.random() < 0.06 else 99  # a few users leave early,
    unanswered = patience == 99 and rng.random() < 0.015         # or never answer the last question
    idle = False  # the expert's last utterance asked for no item
    digressed = False  # the user's last utterance told nothing
    while missing := open_items(who["complaint"], talk.known):
        if patience == 0:
            talk.hear(remark(rng, who, PARTING))
            break
        patience -= 1
        idle = not idle and rng.random() < 0.24
        if idle:
            talk.idle()
            continue
        asks = talk.ask(missing)
        if unanswered and len(missing) == 1:
            break
        digressed = not digressed and rng.random() < 0.1
        if digressed:
            talk.hear(remark(rng, who, DIGRESSIONS))
        else:
            talk.answer(asks)
    else:
        talk.close()
    row = {"session_id": number if split == "train" else 100_000 + number,
           "diagn": who["complaint"], "goal": GOAL, "messages": talk.messages}
    return {**row, "success": False} if patience == 0 else row


def lexicon():
    """-> the lexicon as a dict: the questions and replies of each attribute, the cues of each complaint."""
    attributes = {}
    for slot in ATTRIBUTES:
        entry = {"yes_no": True} if slot in YES_NO else {}
        entry["asks"] = QUESTIONS[slot][1]
        entry["values"] = {value: cues for value, (_, cues) in PHRASES[slot].items()}
        attributes[slot] = entry
    complaints = {}
    for name in COMPLAINTS:
        complaints[name] = {"cues": OPENINGS[name][1], "attributes": [slot for slot, *_ in CHECKLISTS[name]]}
    return {"goal": "Find out what a pharmacist needs to know before recommending a remedy.",
            "yes": YES, "no": NO, "openers": OPENERS,
            "generic_questions": ["anything else", "other symptoms", "tell me more", "what else"],
            "attributes": attributes, "complaints": complaints}


# ------------------------------------------------------------------------------------------- the base corpus

# The manner of each assistant turn under the policy's prompt, drawn for each turn, and its share.
MANNERS = {"attentive": 0.27, "random": 0.32, "generic": 0.15, "double": 0.10, "chatter": 0.15, "stop": 0.01}
CHATTER = CLOSINGS + ["Do not worry, it will pass.", "That is quite common.", "Thank you for telling me."]
HASTY_LEADS = ["Well, ", "So, ", "Now, "]
ATTENTIVE = "Ask for what is missing, else stop."  # the other system prompts: always attentive,
READ = "List what is known and missing."           # and reading exercises
# The order in which the base asks: arbitrary, one for each complaint, unlike the expert's.
HABITS = {name: random.Random(name).sample([slot for slot, *_ in items], len(items))
          for name, items in CHECKLISTS.items()}


def habitual(complaint, known):
    """The open items in the base's own order."""
    return sorted(open_items(complaint, known), key=HABITS[complaint].index)


def attentive(rng, who, known):
    """-> (text, slots asked): the first open item by habit, or the stop marker when none is left.

    Most of these questions follow a word of acknowledgement; those of the random manner follow other words or
    none. As in a large model, the first words decide the manner, so a reward can find the attentive one.
    """
    missing = habitual(who["complaint"], known)[:1]
    return (question(rng, missing, LEADS, 0.7), missing) if missing else (STOP, [])


def mannered(rng, who, known):
    """-> (text, slots asked) in a manner drawn from MANNERS."""
    manner = rng.choices(list(MANNERS), list(MANNERS.values()))[0]
    if manner == "attentive":
        return attentive(rng, who, known)
    if manner == "stop":
        return STOP, []
    if manner == "generic":
        return rng.choice(GENERIC_QUESTIONS), []
    if manner == "chatter":
        return rng.choice(CHATTER), []
    slots = rng.sample(list(ATTRIBUTES), 2 if manner == "double" else 1)
    return question(rng, slots, HASTY_LEADS, 0.3), slots


def reading(who, known):
    """The response of a reading exercise: the complaint, what is known, what is missing (by habit)."""
    told = ", ".join(f"{slot} {value}" for slot, value in known.items()) or "nothing"
    missing = ", ".join(habitual(who["complaint"], known)) or STOP
    return f"{who['complaint']}: {told}; missing: {missing}"


def card(rng):
    """A short reading exercise: a user who says much at once. -> [(role, text, weight)]"""
    who, known = patient(rng), {}
    for _ in range(rng.randint(0, 5)):
        missing = open_items(who["complaint"], known)
        slot = rng.choice(missing if missing and rng.random() < 0.85 else list(ATTRIBUTES))
        known[slot] = who["truth"][slot]
    said = [("user", message["content"], 0) for message in opening(rng, who, known)]
    return [("system", READ, 0), *said, ("assistant", reading(who, known), 1)]


def listener(rng, who, known, text, asks):
    """The user's messages after the base said this text, which asks for these slots."""
    if asks and rng.random() < 0.92:
        extra = volunteer_beside(rng, who, known, asks) if rng.random() < 0.12 else []
        return reply(rng, who, asks, extra)
    if text in GENERIC_QUESTIONS and rng.random() < 0.6:
        parts = facts(rng, who, volunteer(rng, who, known, 1))
        return utterance(rng, who, parts) if parts else remark(rng, who, NO)
    return remark(rng, who, DIGRESSIONS + SMALL_TALK)


def dialogue(rng, system, manner):
    """One conversation, at times with a reading exercise at its end. manner(rng, who, known) is the speaker.

    Some attentive turns have weight 0: they are never trained on. They take the conversation to where little
    is missing, and leave the shares of the manners among the trained turns as they are.
    """
    who, known, doc = patient(rng), {}, [("system", system, 0)]

    def hear(said):
        for message in said:
            doc.append(("user", message["content"], 0))
            known.update(message["learned"])

    hear(opening(rng, who, volunteer(rng, who, {}, rng.choices([0, 1, 2, 3], [40, 30, 20, 10])[0])))
    for _ in range(rng.randint(2, 6)):
        helped = manner is mannered and rng.random() < 0.3 and bool(open_items(who["complaint"], known))
        text, asks = (attentive if helped else manner)(rng, who, known)
        doc.append(("assistant", text, 0 if helped else 1))
        if text == STOP:
            break
        hear(listener(rng, who, known, text, asks))
    if rng.random() < 0.4:
        doc += [("system", READ, 0), ("assistant", reading(who, known), 1)]
    return doc


def merged(doc):
    """Consecutive messages of one role as one, as in the contexts that hindsight.py writes."""
    out = []
    for role, text, weight in doc:
        if out and out[-1][0] == role:
            text = f"{out.pop()[1]}\n{text}"
        out.append((role, text, weight))
    return out


def corpus(seed, n):
    """n documents [(role, text, weight)]: practice under other system prompts, then mostly the policy's."""
    system = load_prompt(POLICY_PROMPT).replace("{goal}", GOAL)
    docs = []
    for i in tqdm(range(n), desc="base corpus", unit=" documents", disable=None):
        rng = random.Random(f"{seed} base {i}")
        early = i < EARLY * n
        if early and rng.random() < CARDS:
            docs.append(card(rng))
        elif early or rng.random() < PRACTICE:
            docs.append(dialogue(rng, ATTENTIVE, attentive))
        else:
            docs.append(dialogue(rng, system, mannered))
    return [merged(doc) for doc in docs]


# ----------------------------------------------------------------------------- tokenizer and base checkpoint

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")
VOCABULARY = 1024
SHAPE = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 128,
         "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
         "tie_word_embeddings": True, "hidden_act": "silu", "use_sliding_window": False,
         "initializer_range": 0.06, "dtype": "float32"}
DOCUMENTS = 28_000
EARLY = 0.6  # share of the documents that come early
CARDS, PRACTICE = 0.15, 0.3  # share of cards among the early documents, and of practice among the later ones
TOKENS_PER_STEP, LR = 800, 3e-3
WARMUP_STEPS, DECAY = 40, 0.6  # the last 60% of the steps take the learning rate down to 0
WINDOW = 200  # documents sorted by length at once
USER_WEIGHT = 0.2  # of the loss on users' words, which teaches what belongs to which question


def make_tokenizer(docs, size=VOCABULARY):
    """Byte-level BPE over the corpus, with Qwen2's way of splitting words and ChatML's template.

    transformers reads it back as a Qwen2 tokenizer, whatever class wrote it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator((f"{role}\n{text}" for doc in docs for role, text, _ in doc), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHAT)


def encode(doc, piece):
    """A document in the chat format -> (token ids, loss weight of each). `piece(text)` gives a text's ids."""
    ids, weights = [], []
    for role, text, weight in doc:
        head, body, end = piece(f"<|im_start|>{role}\n"), piece(f"{text}<|im_end|>"), piece("\n")
        said = USER_WEIGHT if role == "user" else float(weight)
        ids += head + body + end
        weights += [0.0] * len(head) + [said] * len(body) + [0.0] * len(end)
    return ids, weights


def batches(lengths, rng):
    """Documents near each other in length and in the corpus, up to TOKENS_PER_STEP -> lists of indices."""
    out = []
    for start in range(0, len(lengths), WINDOW):
        window, group = [], []
        for i in sorted(range(start, min(start + WINDOW, len(lengths))), key=lambda i: lengths[i]):
            if group and sum(lengths[j] for j in group) + lengths[i] > TOKENS_PER_STEP:
                window.append(group)
                group = []
            group.append(i)
        window.append(group)
        rng.shuffle(window)
        out += window
    return out


def new_model(folder, seed):
    """A decoder with random weights, of the shape in folder/config.json."""
    torch.manual_seed(seed)
    model = decoder.Decoder(decoder.read_shape(folder))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=SHAPE["initializer_range"])
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    return model


def next_token_loss(model, documents):
    """Weighted mean loss of a batch of encoded documents, packed into one sequence."""
    lengths = [len(ids) for ids, _ in documents]
    ids = torch.tensor([t for tokens, _ in documents for t in tokens])  # [N]
    weights = torch.tensor([w for _, parts in documents for w in parts])  # [N]
    spans = decoder.causal_spans(lengths)
    scored = weights.nonzero().flatten()  # [M]
    logits = model(ids, torch.cat([torch.arange(n) for n in lengths]),
                   lambda layer, q, k, v: decoder.attention(q, k, v, spans),
                   head=lambda x, weight: F.linear(x[scored - 1], weight))  # [M, V]
    return F.cross_entropy(logits, ids[scored], reduction="none") @ weights[scored] / weights.sum()


def train_base(docs, tokenizer, folder, seed, steps=None, shape=SHAPE):
    """One pass of next-token loss on the assistant's words and, lightly, the user's. Writes the folder."""
    torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain (NOTES.md)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # of a library that has no kinds of them: a full disk, say
        raise InputError(f"{folder} cannot be written ({error})")
    write_json(folder / "config.json", {**shape, "vocab_size": len(tokenizer),
                                        "eos_token_id": tokenizer.eos_token_id,
                                        "pad_token_id": tokenizer.pad_token_id})
    model = new_model(folder, seed)
    piece = functools.lru_cache(maxsize=None)(tokenizer.encode)
    documents = [encode(doc, piece) for doc in docs]
    order = batches([len(ids) for ids, _ in documents], random.Random(seed))[:steps]

    def lr_factor(step):
        return min((step + 1) / WARMUP_STEPS, 1, (1 - step / len(order)) / DECAY)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    bar, shown = tqdm(order, desc="base model", unit=" steps", disable=None), 0.0
    for step, group in enumerate(bar):
        loss = next_token_loss(model, [documents[i] for i in group])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        shown += (loss.item() - shown) / min(step + 1, 100)
        bar.set_postfix_str(f"loss {shown:.3f}", refresh=False)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


# ----------------------------------------------------------------------------------------------- the command

FILES = ("train.jsonl", "test.jsonl", "lexicon.yaml", "base/config.json", "base/model.safetensors",
         "base/tokenizer.json", "base/tokenizer_config.json")


def version(seed, sessions, base_steps):
    """What the world is made of: a hash of this file, the policy's prompt and the arguments."""
    text = "".join(p.read_text(encoding="utf-8") for p in (Path(__file__), POLICY_PROMPT))
    return hashlib.sha256(f"{text} {seed} {sessions} {base_steps}".encode()).hexdigest()


def make(out, seed=0, sessions=(1600, 400), base_steps=None):
    """Write the world under `out`; base_steps cuts the base's training short (for tests)."""
    out = Path(out)
    stamp, made = {"version": version(seed, sessions, base_steps)}, out / "made.json"
    whole = made.is_file() and all((out / name).is_file() for name in FILES)
    if whole and json.loads(made.read_text(encoding="utf-8")) == stamp:
        print(f"{out}: already made")
        return
    made.unlink(missing_ok=True)
    for split, n in zip(("train", "test"), sessions):
        rows = [session(seed, split, i) for i in tqdm(range(n), desc=f"{split} sessions", disable=None)]
        write_jsonl(out / f"{split}.jsonl", rows)
    write_text(out / "lexicon.yaml", yaml.safe_dump(lexicon(), sort_keys=False, width=120))
    docs = corpus(seed, DOCUMENTS if base_steps is None else min(DOCUMENTS, 20 * base_steps + 400))
    tokenizer = make_tokenizer(docs[-4000:])
    model = train_base(docs, tokenizer, out / "base", seed, base_steps)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    write_json(made, stamp)
    print(f"{out}: {sessions[0]} + {sessions[1]} sessions, lexicon.yaml, base/ ({size:.2f}M parameters)")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.out:
        raise InputError("--out is empty: name a folder")
    make(args.out, args.seed)


if __name__ == "__main__":
    cli(main)
