"""The offline miniature: pharmacy logs, lexicon, tokenizer and a small base checkpoint, all made here from a seed.

    python toy.py --out runs/toy/world --seed 0

writes train.jsonl and test.jsonl (1,600 and 400 sessions, in the format of real logs, with the generator's truth in
"learned" and "asks"), lexicon.yaml (for the rules extractor and the rules grader) and base/, a Hugging Face folder
with a Qwen2 model of about half a million parameters. A rerun with the same seed and the same code returns at once.

What is in it. Each complaint has an ordered checklist whose later items depend on the answers so far; the expert asks
the first item still open and stops when none is, so the right decision is a function of the conversation's content.
As in messenger logs of real experts, not every utterance is one good question: in between they make small talk, ask
"Anything else?", or two things at once (INTERLUDES). Cloning them copies that; the users' answers tell what mattered.
The base plays the paper's instruct model: fluent, without a strategy, hardly ever stopping. Under the policy's prompt
each of its training turns draws a manner of its own (MANNERS): only the "attentive" minority asks for an open item,
in an arbitrary order, or stops when none is left. Under other system prompts it practises what a large model brings
along: being attentive throughout, and saying what is known and what is missing. It does see which items belong to a
complaint, and when; it never sees the expert's order or an expert's session.
"""
import argparse
import functools
import hashlib
import json
import random
from pathlib import Path

import yaml
from tqdm import tqdm

from data import STOP, load_prompt, write_json, write_jsonl, write_text

HERE = Path(__file__).parent
GOAL = "Know enough to advise."

# ------------------------------------------------------------------------------------------------------ data tables
# "what people write | another way | ... :: what the lexicon looks for | ..." (regexes; word boundaries are implied)

ATTRIBUTES = {
    "duration": ("How long have you had it? | Since when? | When did it start? | How many days has it been going on? | "
                 "For how long now? :: how long | since when | when did it | how many days", {
        "today": "since this morning | it started today | only a few hours | I woke up with it | it began this morning "
                 ":: this morning | started today | few hours | woke up with it",
        "two days": "for two days | about 2 days | since the day before yesterday | two days now | a couple of days "
                    ":: two days | 2 days | day before yesterday | couple of days",
        "a week": "for a week | about a week | since last week | seven days or so | a week now "
                  ":: a week | last week | seven days",
        "a month": "for a month | about four weeks | since last month | more than a month | a month now "
                   ":: a month | four weeks | last month"}),
    "fever": ("Do you have a fever? | Any fever? | Is your temperature raised? | Have you measured a fever? | "
              "Are you running a temperature? :: fever | temperature", {
        "yes": "I have a fever | I feel feverish | my temperature is high | I am running a temperature | fever too "
               ":: have a fever | feverish | temperature is high | running a temperature | fever too",
        "no": "no fever | my temperature is normal | I do not have a fever | without any fever | I am not feverish "
              ":: no fever | temperature is normal | not have a fever | without any fever | not feverish"}),
    "phlegm": ("Do you bring up phlegm? | Is there any phlegm? | Are you coughing up mucus? | Is the cough wet? | "
               "Any phlegm coming up? :: any phlegm | up phlegm | up mucus | cough wet", {
        "yes": "I bring up phlegm | there is phlegm | it is a wet cough | I cough up mucus | lots of phlegm "
               ":: bring up phlegm | there is phlegm | wet cough | up mucus | lots of phlegm",
        "no": "no phlegm | it is a dry cough | nothing comes up | rather dry | there is no phlegm "
              ":: no phlegm | dry cough | nothing comes up | rather dry"}),
    "colour": ("What colour is the phlegm? | Which colour does it have? | What does the phlegm look like? | "
               "Is it clear or yellow? | What is its colour? :: colour | phlegm look | clear or yellow", {
        "clear": "the phlegm is clear | clear and thin | it is transparent | quite clear | white and clear "
                 ":: clear | transparent",
        "yellow": "it is yellow | yellow phlegm | a yellow green | thick and yellow | it looks yellow :: yellow",
        "bloody": "there is blood in it | a bit of blood | it is bloody | some red streaks | brown with blood "
                  ":: blood | bloody | red streaks"}),
    "night": ("Is it worse at night? | Does it bother you at night? | Is it bad at night? | Does it wake you up? | "
              "Is it worse when lying down? :: at night | wake you | lying down", {
        "yes": "it is worse at night | the nights are bad | it wakes me up | worse when lying down | bad at night "
               ":: worse at night | nights are bad | wakes me | lying down | bad at night",
        "no": "the nights are fine | not worse at night | I sleep well | same day and night | the nights are quiet "
              ":: nights are fine | not worse at night | sleep well | day and night | nights are quiet"}),
    "smoking": ("Do you smoke? | Are you a smoker? | Any cigarettes? | Have you ever smoked? | "
                "Is smoking a habit of yours? :: smok\\w* | cigarettes", {
        "yes": "I smoke | a pack a day | I am a smoker | ten cigarettes a day | I smoke a little "
               ":: i smoke | pack a day | a smoker | ten cigarettes",
        "no": "I do not smoke | never smoked | I am a non-smoker | I quit smoking | no cigarettes "
              ":: not smoke | never smoked | non-smoker | quit smoking | no cigarettes"}),
    "severity": ("How bad is it? | How strong is the pain? | Is it mild or severe? | How much does it hurt? | "
                 "How severe is it? :: how bad | how strong | mild or | how much does | how severe", {
        "mild": "it is mild | not too bad | only a little pain | quite mild | bearable "
                ":: mild | not too bad | little pain | bearable",
        "strong": "it is strong | quite bad | it hurts a lot | rather strong | pretty bad "
                  ":: strong | quite bad | hurts a lot | pretty bad",
        "unbearable": "it is unbearable | I can not stand it | the worst ever | terrible pain | simply unbearable "
                      ":: unbearable | not stand it | worst ever | terrible pain"}),
    "spreading": ("Is it spreading? | Does it move anywhere else? | Has it spread? | Is it getting bigger? | "
                  "Does it go beyond one spot? :: spread\\w* | move anywhere | getting bigger | one spot", {
        "yes": "it is spreading | it moves further | it gets bigger | it spread a lot | larger every hour "
               ":: is spreading | moves further | gets bigger | spread a lot | larger every",
        "no": "it stays in one place | not spreading | it has not spread | only one spot | it stays put "
              ":: in one place | not spreading | not spread | one spot | stays put"}),
    "itching": ("Does it itch? | Is it itchy? | Any itching? | Do you feel like scratching? | Do you have to scratch? "
                ":: itch\\w* | scratch\\w*", {
        "yes": "it itches | it is itchy | I keep scratching | itches a lot | very itchy "
               ":: itches | is itchy | keep scratching | very itchy",
        "no": "it does not itch | no itching | not itchy | I never scratch | without itching "
              ":: not itch | no itching | not itchy | never scratch | without itching"}),
    "swelling": ("Is it swollen? | Any swelling? | Has it swollen up? | Do you see a swelling? | Does it feel thick? "
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
              "What are your bowel movements like? | How is your stool? :: stool | bowel", {
        "watery": "it is watery | like water | very loose | watery stool | loose and thin "
                  ":: watery | like water | loose",
        "hard": "it is hard | like pebbles | hard and dry | hard lumps | hard stool :: hard | pebbles",
        "black": "it is black | dark as tar | black stool | very dark | black and sticky "
                 ":: black | dark as tar | very dark"}),
    "trigger": ("What brings it on? | What makes it worse? | When does it get worse? | Is there a trigger? | "
                "What sets it off? :: brings it on | makes it worse | get worse | trigger\\w* | sets it off", {
        "food": "after meals | when I eat | spicy food | after eating | food does it "
                ":: after meals | i eat | spicy food | after eating | food does",
        "stress": "stress at work | when I am stressed | under stress | a lot of stress | stress mostly "
                  ":: stress | stressed",
        "cold": "cold air | in the cold | when it is cold | cold wind | cold weather "
                ":: cold air | the cold | is cold | cold wind | cold weather",
        "exercise": "when I run | after sport | during exercise | when I lift things | exercise mostly "
                    ":: when i run | sport | exercise | lift things"}),
    "medicine": ("What have you taken so far? | Have you tried any medicine? | Which medicine did you take? | "
                 "Are you taking anything for it? | Did you take something already? "
                 ":: have you taken | any medicine | which medicine | taking anything | take something", {
        "nothing": "I took nothing | nothing so far | no medicine yet | I have not taken anything | nothing yet "
                   ":: took nothing | nothing so far | no medicine | not taken | nothing yet",
        "aspirin": "I took aspirin | some aspirin | aspirin twice | one aspirin | aspirin yesterday :: aspirin",
        "ibuprofen": "I took ibuprofen | some ibuprofen | ibuprofen twice | one ibuprofen | ibuprofen yesterday "
                     ":: ibuprofen",
        "herbal tea": "only herbal tea | I drank some tea | tea with honey | ginger tea | a lot of tea "
                      ":: herbal tea | some tea | tea with honey | ginger tea"}),
    "age": ("How old are you? | What is your age? | How old is the patient? | Is it for a child or an adult? | "
            "May I ask your age? :: how old | your age | child or", {
        "child": "it is for my son | for my daughter | a child of five | for my little boy | he is six "
                 ":: my son | my daughter | a child | little boy | is six",
        "adult": "I am thirty | I am 35 | forty years old | I am an adult | in my forties "
                 ":: am thirty | am 35 | forty years | an adult | my forties",
        "senior": "I am seventy | I am 72 | eighty years old | retired already | in my seventies "
                  ":: am seventy | am 72 | eighty years | retired | my seventies"}),
    "coffee": ("Do you drink coffee? | Any coffee? | Do you have coffee in the evening? | Are you a coffee drinker? | "
               "Is coffee part of your day? :: coffee", {
        "yes": "I drink coffee | three coffees a day | lots of coffee | coffee all day | coffee every day "
               ":: i drink coffee | three coffees | lots of coffee | coffee all day | coffee every",
        "no": "no coffee | I do not drink coffee | only decaf | never coffee | I gave up coffee "
              ":: no coffee | not drink coffee | decaf | never coffee | gave up coffee"}),
    "allergies": ("Do you have any allergies? | Any allergies? | Are you allergic to anything? | "
                  "Is there any allergy? | Any allergies I should know about? :: allerg\\w*", {
        "yes": "I am allergic to penicillin | allergic to nuts | a pollen allergy | I have allergies | "
               "allergic to dust :: am allergic | allergic to | pollen allergy | have allergies",
        "no": "no allergies | not allergic | I have no allergies | none that I know | without allergies "
              ":: no allergies | not allergic | none that i know | without allergies"}),
    "pregnancy": ("Are you pregnant? | Could you be pregnant? | Is there a pregnancy? | Any chance of a pregnancy? | "
                  "Are you expecting a baby? :: pregnan\\w* | expecting", {
        "yes": "I am pregnant | in my fifth month of pregnancy | I am expecting | pregnant indeed | expecting a baby "
               ":: am pregnant | of pregnancy | am expecting | pregnant indeed | expecting a baby",
        "no": "I am not pregnant | no pregnancy | not expecting | certainly not pregnant | not pregnant "
              ":: not pregnant | no pregnancy | not expecting"}),
}
GENERIC = ("allergies", "pregnancy")  # context-independent: asked by the expert at times, never part of I*
CASUAL = ("age", "smoking", "duration", "medicine", "fever")  # what people mention whether it matters or not

# complaint: (how people put it :: what the lexicon looks for, the expert's checklist in order, "item ? earlier=answer")
COMPLAINTS = {
    "cough": ("I have a cough | a bad cough | I keep coughing | coughing a lot | this cough bothers me "
              ":: a cough | bad cough | coughing | this cough",
              "duration, phlegm, colour ? phlegm=yes, night ? phlegm=no, smoking"),
    "sore throat": ("my throat hurts | sore throat | my throat is sore | a burning throat | it hurts to swallow "
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
    "earache": ("my ear hurts | earache | pain in my ear | I have an earache | my ear aches :: my ear | earache",
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
OPENERS = ["how", "what", "when", "since", "for", "which", "do", "does", "did", "is", "are", "has", "have", "any",
           "could", "can", "may"]
GREETINGS = ["Hello", "Hi", "Good morning", "Hi there", "Good evening", "Hello, can you help me"]
SMALL_TALK = ["Thanks for asking", "Good question", "Let me think", "Well", "Okay", "Hm"]
DIGRESSIONS = ["Will it go away soon?", "Do you sell vitamins?", "My neighbour is such a nice man", "What a busy shop",
               "Is it serious?", "I read a lot about it", "The bus was late", "What do other people buy?",
               "I was at the market before", "My sister works here too", "Can I pay by card?", "It is raining outside",
               "I hope you can help me", "My friend had a fever last month", "My phone rang", "How much is that?"]
LEADS = ["Okay, ", "I see, ", "Thanks, ", "Alright, ", "Thank you, "]
ASIDES = ["Okay.", "I see.", "Thank you.", "Let me help you."]
INTERLUDES = ["One moment, please.", "Sorry, the connection was gone.", "I am looking it up.", "Sure, I am with you.",
              "That happens a lot these days.", "Let me write that down.", "I just had another customer."]
GENERIC_QUESTIONS = ["Anything else?", "Do you have any other symptoms?", "Can you tell me more?",
                     "Is there anything else I should know?", "What else can you tell me?"]
CLOSINGS = ["Take these tablets twice a day.", "I recommend this syrup.", "Try this cream for some days.",
            "Please see a doctor about that.", "Drink plenty of water and rest.", "These drops will help.",
            "I will give you a mild remedy.", "Use this spray every evening."]
PARTING = ["I have to go", "Forget it", "I will ask a doctor instead", "Never mind, goodbye", "That takes too long"]


def pieces(text):
    """'a | b :: c' -> (['a', 'b'], ['c'])."""
    said, cues = text.split("::")
    return [s.strip() for s in said.split("|")], [c.strip() for c in cues.split("|")]


def checklist(text):
    """'a, b ? a=x/y' -> [('a', None, ()), ('b', 'a', ('x', 'y'))]: item, and the earlier item and answers it needs."""
    items = []
    for item in text.split(", "):
        slot, _, condition = item.partition(" ? ")
        on, _, answers = condition.partition("=")
        items.append((slot, on or None, tuple(answers.split("/")) if on else ()))
    return items


QUESTIONS = {slot: pieces(ask) for slot, (ask, _) in ATTRIBUTES.items()}
PHRASES = {slot: {value: pieces(text) for value, text in values.items()} for slot, (_, values) in ATTRIBUTES.items()}
OPENINGS = {name: pieces(text) for name, (text, _) in COMPLAINTS.items()}
CHECKLISTS = {name: checklist(text) for name, (_, text) in COMPLAINTS.items()}
YES_NO = [slot for slot, values in PHRASES.items() if list(values) == ["yes", "no"]]


# ------------------------------------------------------------------------------------------------- who says what

def open_items(complaint, known):
    """What is still missing, in the expert's order: items unknown whose condition the known answers fulfil.

    >>> open_items("cough", {"duration": "today", "phlegm": "no"})
    ['night', 'smoking']
    """
    return [slot for slot, on, answers in CHECKLISTS[complaint]
            if slot not in known and (on is None or known.get(on) in answers)]


def patient(rng):
    """-> {complaint, truth: a value for every attribute, lower: writes without capitals and full stops}."""
    return {"complaint": rng.choice(list(COMPLAINTS)), "lower": rng.random() < 0.5,
            "truth": {slot: rng.choice(list(values)) for slot, values in PHRASES.items()}}


def styled(who, text):
    if who["lower"]:
        return text.lower()
    return text[0].upper() + text[1:] + ("" if text[-1] in "?.!" else ".")


def clause(rng, slot, value, typos=0.015):
    """One way of saying that slot has this value; now and then with two letters swapped."""
    text = rng.choice(PHRASES[slot][value][0])
    if rng.random() < typos:
        word = max(text.split(), key=len)
        i = rng.randrange(len(word) - 1)
        text = text.replace(word, word[:i] + word[i + 1] + word[i] + word[i + 2:])
    return text


def utterance(rng, who, parts):
    """[(text, {slot: value})] -> user messages: one message, or one for each part."""
    if len(parts) > 1 and rng.random() < 0.3:
        groups = [[part] for part in parts]
    else:
        groups = [parts]
    messages = []
    for group in groups:
        if len(group) > 1 and all(text[-1].isalnum() for text, _ in group):
            joint = ", " if group[0][0] in GREETINGS + SMALL_TALK else rng.choice([", ", " and ", ", "])
            content = styled(who, joint.join(text for text, _ in group))
        else:
            content = " ".join(styled(who, text) for text, _ in group)
        learned = {slot: value for _, facts in group for slot, value in facts.items()}
        messages.append({"role": "user", "content": content, "learned": learned})
    return messages


def opening(rng, who, volunteered):
    """The first user utterance: perhaps a greeting, the complaint, and facts nobody has asked for."""
    parts = [(rng.choice(GREETINGS), {})] if rng.random() < 0.2 else []
    parts.append((rng.choice(OPENINGS[who["complaint"]][0]), {}))
    parts += [(clause(rng, slot, who["truth"][slot]), {slot: who["truth"][slot]}) for slot in volunteered]
    return utterance(rng, who, parts)


def answer(rng, who, asked, extra=()):
    """The user answers what was asked, then says the extra slots; a bare yes or no only to a single question."""
    parts = [(rng.choice(SMALL_TALK), {})] if rng.random() < 0.06 else []
    for slot in asked:
        value = who["truth"][slot]
        if slot in YES_NO and len(asked) == 1 and rng.random() < 0.5:
            bare = rng.choice(YES if value == "yes" else NO)
            parts = [(bare + ("." if extra else ""), {slot: value})]
        else:
            parts.append((clause(rng, slot, value), {slot: value}))
    parts += [(clause(rng, slot, who["truth"][slot]), {slot: who["truth"][slot]}) for slot in extra]
    return utterance(rng, who, parts)


def volunteer(rng, who, known, n):
    """n slots to mention unasked: mostly open ones, at times beside the point. -> list of slots."""
    slots, known = [], dict(known)
    for _ in range(n):
        listed = [slot for slot, *_ in CHECKLISTS[who["complaint"]]]
        casual = [slot for slot in CASUAL if slot not in known and slot not in listed]
        candidates = casual if casual and rng.random() < 0.2 else open_items(who["complaint"], known)
        if candidates:
            slot = rng.choice(candidates)
            slots.append(slot)
            known[slot] = who["truth"][slot]
    return slots


def decapitalised(text):
    return text[0].lower() + text[1:]


def question(rng, slots, leads=LEADS, share=0.2):
    """One question, or two in one utterance; this share of them after a lead-in."""
    asks = [rng.choice(QUESTIONS[slot][0]) for slot in slots]
    text = asks[0]
    if len(asks) == 2:
        text = f"{asks[0]} {asks[1]}" if rng.random() < 0.5 else f"{asks[0][:-1]}, and {decapitalised(asks[1])}"
    return rng.choice(leads) + decapitalised(text) if rng.random() < share else text


def assistant(content, asks=()):
    return {"role": "assistant", "content": content, "asks": list(asks)}


# ------------------------------------------------------------------------------------------------------- the logs

def session(seed, split, number):
    """One expert conversation, a function of its arguments alone (so that more sessions never change earlier ones)."""
    rng = random.Random(f"{seed} {split} {number}")
    who, known, messages, digressed = patient(rng), {}, [], False

    def hear(said):
        messages.extend(said)
        for message in said:
            known.update(message["learned"])

    if rng.random() < 0.08:
        messages.append(assistant("Hello, how can I help you?"))
    hear(opening(rng, who, volunteer(rng, who, {}, rng.choices([0, 1, 2], [50, 35, 15])[0])))
    patience = rng.randint(1, 2) if rng.random() < 0.06 else 99  # a few users leave early,
    unanswered = patience == 99 and rng.random() < 0.015         # or never answer the last question
    idle = False  # the expert's last utterance was no question about an item
    while missing := open_items(who["complaint"], known):
        if patience == 0:
            hear(utterance(rng, who, [(rng.choice(PARTING), {})]))
            break
        patience -= 1
        idle = not idle and rng.random() < 0.24
        if idle:
            generic = rng.random() < 0.4
            messages.append(assistant(rng.choice(GENERIC_QUESTIONS if generic else INTERLUDES)))
            told = volunteer(rng, who, known, 1) if rng.random() < (0.5 if generic else 0.2) else []
            hear(answer(rng, who, [], told) if told else
                 utterance(rng, who, [(rng.choice(NO if generic else DIGRESSIONS + SMALL_TALK), {})]))
            continue
        asks = missing[:2] if len(missing) > 1 and rng.random() < 0.15 else missing[:1]
        if rng.random() < 0.06:
            messages.append(assistant(rng.choice(ASIDES)))
        messages.append(assistant(question(rng, asks), asks))
        if unanswered and len(missing) == 1:
            break
        digressed = not digressed and rng.random() < 0.1
        if digressed:
            hear(utterance(rng, who, [(rng.choice(DIGRESSIONS), {})]))
            continue
        extra = []
        if rng.random() < 0.12:
            extra = volunteer(rng, who, {**known, **{slot: who["truth"][slot] for slot in asks}}, 1)
        elif known and rng.random() < 0.03:
            extra = [rng.choice(list(known))]
        hear(answer(rng, who, asks, [slot for slot in extra if slot not in asks]))
    else:
        if rng.random() < 0.15:
            slot = rng.choices(GENERIC, [80, 20])[0]
            messages.append(assistant(question(rng, [slot]), [slot]))
            hear(answer(rng, who, [slot]))
        if rng.random() < 0.8:
            messages.append(assistant(rng.choice(CLOSINGS)))
    row = {"session_id": number if split == "train" else 100_000 + number, "diagn": who["complaint"], "goal": GOAL,
           "messages": messages}
    return {**row, "success": False} if patience == 0 else row


def lexicon():
    """-> the lexicon as a dict: which questions and which answers belong to which attribute, and each complaint's."""
    attributes = {}
    for slot in ATTRIBUTES:
        entry = {"yes_no": True} if slot in YES_NO else {}
        entry["asks"] = QUESTIONS[slot][1]
        entry["values"] = {value: cues for value, (_, cues) in PHRASES[slot].items()}
        attributes[slot] = entry
    return {"goal": "Find out what a pharmacist needs to know before recommending a remedy.",
            "yes": YES, "no": NO, "openers": OPENERS,
            "generic_questions": ["anything else", "other symptoms", "tell me more", "what else"],
            "attributes": attributes,
            "complaints": {name: {"cues": OPENINGS[name][1], "attributes": [slot for slot, *_ in CHECKLISTS[name]]}
                           for name in COMPLAINTS}}


# ------------------------------------------------------------------------------------------------- the base corpus

# The manner of each assistant turn under the policy's prompt, drawn anew for each turn, and its share.
MANNERS = {"attentive": 0.27, "random": 0.32, "generic": 0.15, "double": 0.10, "chatter": 0.15, "stop": 0.01}
CHATTER = CLOSINGS + ["Do not worry, it will pass.", "That is quite common.", "Thank you for telling me."]
HASTY_LEADS = ["Well, ", "So, ", "Now, "]
ATTENTIVE = "Ask for what is missing, else stop."  # the other system prompts: always attentive,
READ = "List what is known and missing."           # and reading exercises


HABITS = {name: random.Random(name).sample([slot for slot, *_ in items], len(items))
          for name, items in CHECKLISTS.items()}


def habitual(complaint, known):
    """The open items in the base's own order: arbitrary, one for each complaint, unlike the expert's."""
    return sorted(open_items(complaint, known), key=HABITS[complaint].index)


def attentive(rng, who, known):
    """-> (text, slots asked): an open item, the first by habit, or the stop marker when none is left.

    Its questions mostly follow a word of acknowledgement, and those of the random manner other words or none: as in a
    large model, what comes first decides the manner, so that a reward can find the attentive one.
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
    """The answer of a reading exercise: the complaint, what is known, what is missing (by habit)."""
    facts = ", ".join(f"{slot} {value}" for slot, value in known.items()) or "nothing"
    return f"{who['complaint']}: {facts}; missing: {', '.join(habitual(who['complaint'], known)) or STOP}"


def card(rng):
    """A short reading exercise: a user who says much at once. -> [(role, text, weight)]."""
    who, known = patient(rng), {}
    for _ in range(rng.randint(0, 5)):
        missing = open_items(who["complaint"], known)
        slot = rng.choice(missing if missing and rng.random() < 0.85 else list(ATTRIBUTES))
        known[slot] = who["truth"][slot]
    return [("system", READ, 0), *((m["role"], m["content"], 0) for m in opening(rng, who, known)),
            ("assistant", reading(who, known), 1)]


def dialogue(rng, system, manner):
    """One conversation; `manner(rng, who, known)` speaks for the assistant. At times it ends in a reading exercise.

    Some turns are attentive ones of weight 0 (never trained on): they move the conversation on to where little is
    missing, and leave the shares of the manners in the trained turns as they are.
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
        if asks and rng.random() < 0.92:
            told = {**known, **{slot: who["truth"][slot] for slot in asks}}
            extra = volunteer(rng, who, told, 1) if rng.random() < 0.12 else []
            hear(answer(rng, who, asks, [slot for slot in extra if slot not in asks]))
        elif text in GENERIC_QUESTIONS and rng.random() < 0.6:
            slots = volunteer(rng, who, known, 1)
            parts = [(clause(rng, slot, who["truth"][slot]), {slot: who["truth"][slot]}) for slot in slots]
            hear(utterance(rng, who, parts or [(rng.choice(NO), {})]))
        else:
            hear(utterance(rng, who, [(rng.choice(DIGRESSIONS + SMALL_TALK), {})]))
    if rng.random() < 0.4:
        doc += [("system", READ, 0), ("assistant", reading(who, known), 1)]
    return doc


def merged(doc):
    """Consecutive messages of one role as one, as in the contexts that hindsight.py writes."""
    out = []
    for role, text, weight in doc:
        if out and out[-1][0] == role:
            role, text, weight = role, f"{out.pop()[1]}\n{text}", weight
        out.append((role, text, weight))
    return out


def corpus(seed, n):
    """n documents [(role, text, weight)]: at first practice under other system prompts, then mostly the policy's."""
    system = load_prompt(HERE / "prompts" / "policy_toy.md").replace("{goal}", GOAL)
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


# ------------------------------------------------------------------------------------- tokenizer and base checkpoint

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")
VOCABULARY = 1024
SHAPE = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 256,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
         "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
         "use_sliding_window": False, "initializer_range": 0.06, "dtype": "float32"}
DOCUMENTS = 28_000
EARLY, CARDS, PRACTICE = 0.6, 0.15, 0.3
TOKENS_PER_STEP, LR = 800, 3e-3
USER_WEIGHT = 0.2  # of the loss on users' words, which teaches what belongs to which question


def make_tokenizer(docs):
    """Byte-level BPE over the corpus, with Qwen2's way of splitting words (transformers reads it back as a Qwen2
    tokenizer, whatever class wrote it) and ChatML's special tokens and template."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator((f"{role}\n{text}" for doc in docs for role, text, _ in doc), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHAT)


def encode(doc, piece):
    """-> (token ids of the document in the chat format, loss weight of each). `piece(text)` gives a text's ids."""
    ids, weights = [], []
    for role, text, weight in doc:
        head, body, end = piece(f"<|im_start|>{role}\n"), piece(f"{text}<|im_end|>"), piece("\n")
        ids += head + body + end
        weights += [0.0] * len(head) + [USER_WEIGHT if role == "user" else float(weight)] * len(body) + [0.0] * len(end)
    return ids, weights


def batches(lengths, rng):
    """Documents of similar length and order in the corpus together, up to TOKENS_PER_STEP -> lists of indices."""
    out = []
    for start in range(0, len(lengths), 200):
        window, group = [], []
        for i in sorted(range(start, min(start + 200, len(lengths))), key=lambda i: lengths[i]):
            if group and sum(lengths[j] for j in group) + lengths[i] > TOKENS_PER_STEP:
                window.append(group)
                group = []
            group.append(i)
        window.append(group)
        rng.shuffle(window)
        out += window
    return out


def train_base(docs, tokenizer, folder, seed, steps=None):
    """Next-token loss on the assistant's words (and lightly the user's), one pass. Writes weights and config."""
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file

    import model as decoder
    write_json(folder / "config.json", {**SHAPE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
                                        "pad_token_id": tokenizer.pad_token_id})
    torch.manual_seed(seed)
    model = decoder.Decoder(decoder.read_shape(folder))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=SHAPE["initializer_range"])
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    piece = functools.lru_cache(maxsize=None)(tokenizer.encode)
    data = [encode(doc, piece) for doc in docs]
    plan = batches([len(ids) for ids, _ in data], random.Random(seed))[:steps]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    # 40 steps of warm-up, 40% constant, then linear to nothing
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 40, 1, (1 - s / len(plan)) / 0.6))
    bar, shown = tqdm(plan, desc="base model", unit=" steps", disable=None), 0.0
    for step, group in enumerate(bar):
        lengths = [len(data[i][0]) for i in group]
        ids = torch.tensor([t for i in group for t in data[i][0]])  # [N], packed
        weights = torch.tensor([w for i in group for w in data[i][1]])
        spans = decoder.causal_spans(lengths)
        scored = weights.nonzero().flatten()  # [M]
        logits = model(ids, torch.cat([torch.arange(n) for n in lengths]),
                       lambda layer, q, k, v: decoder.attention(q, k, v, spans),
                       head=lambda x, weight: F.linear(x[scored - 1], weight))  # [M, V]
        loss = F.cross_entropy(logits, ids[scored], reduction="none") @ weights[scored] / weights.sum()
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


# ------------------------------------------------------------------------------------------------------- the command

def version(seed, sessions, base_steps):
    """What the world is made of: a hash of this file, the prompts and the arguments."""
    text = "".join(p.read_text(encoding="utf-8") for p in (Path(__file__), HERE / "prompts" / "policy_toy.md"))
    return hashlib.sha256(f"{text} {seed} {sessions} {base_steps}".encode()).hexdigest()


def make(out, seed=0, sessions=(1600, 400), base_steps=None):
    """Write the world under `out`; base_steps cuts the base's training short (for tests)."""
    out = Path(out)
    stamp, made = {"version": version(seed, sessions, base_steps)}, out / "made.json"
    wanted = [out / name for name in ("train.jsonl", "test.jsonl", "lexicon.yaml", "base/config.json",
                                      "base/model.safetensors", "base/tokenizer.json", "base/tokenizer_config.json")]
    if all(map(Path.is_file, [made, *wanted])) and json.loads(made.read_text(encoding="utf-8")) == stamp:
        print(f"{out}: already made")
        return
    made.unlink(missing_ok=True)
    for split, n in zip(("train", "test"), sessions):
        rows = [session(seed, split, i) for i in tqdm(range(n), desc=f"{split} sessions", disable=None)]
        write_jsonl(out / f"{split}.jsonl", rows)
    write_text(out / "lexicon.yaml", yaml.safe_dump(lexicon(), sort_keys=False, width=120))
    docs = corpus(seed, DOCUMENTS if base_steps is None else min(DOCUMENTS, 20 * base_steps + 400))
    tokenizer = make_tokenizer(docs[-4000:])
    tokenizer.save_pretrained(out / "base")
    model = train_base(docs, tokenizer, out / "base", seed, base_steps)
    parameters = sum(p.numel() for p in model.parameters())
    write_json(made, stamp)
    print(f"{out}: {sessions[0]} + {sessions[1]} sessions, lexicon.yaml, base/ ({parameters / 1e6:.2f}M parameters)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import torch
    torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain (NOTES.md)
    make(args.out, args.seed)


if __name__ == "__main__":
    main()
