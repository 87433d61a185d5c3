"""Everyday prompts for the examples, in TRL's prompt-only conversational format.

Hand-written topics are crossed with hand-written question forms, a category at a time so that every question makes
sense. The last topics of each category are held out, so no test topic is ever seen in training. Many topics are dull
or unpleasant on purpose: a policy that stays cheerful about them has learned something.
"""

from datasets import Dataset


TEST_TOPICS_PER_CATEGORY = 3

# (question forms, topics); each topic is put into each form of its category
CATEGORIES: dict[str, tuple[list[str], list[str]]] = {
    "places": (
        [
            "Describe {} to someone who has never been to one.",
            "What is it like to spend an afternoon in {}?",
            "Would you like to live next to {}? Why or why not?",
            "Write a short review of {}.",
        ],
        [
            "a crowded train station",
            "a small fishing village",
            "an old public library",
            "a hospital waiting room",
            "a busy airport",
            "a city park in autumn",
            "a noisy street market",
            "a cheap motel by the highway",
            "an abandoned factory",
            "a shopping mall on a Saturday",
            "a farm in winter",
            "a coffee shop near a university",
            "a museum of science",
        ],
    ),
    "weather and seasons": (
        [
            "What do you think about {}?",
            "How does {} change the way people feel?",
            "Explain to a child why we have {}.",
            "What should I do at home during {}?",
        ],
        [
            "heavy rain",
            "thunderstorms",
            "long winters",
            "summer heat waves",
            "thick fog",
            "the first snow",
            "strong winds",
            "dry summers",
            "cold spring mornings",
            "short grey days",
            "hail storms",
            "warm autumn evenings",
            "icy roads",
        ],
    ),
    "daily chores": (
        [
            "How do you feel about {}?",
            "Give me some advice on {}.",
            "Why do so many people avoid {}?",
            "Tell me about the worst part of {}.",
        ],
        [
            "washing the dishes",
            "commuting to work by bus",
            "paying the monthly bills",
            "cleaning the bathroom",
            "cooking dinner after a long day",
            "doing the laundry",
            "answering work emails",
            "shopping for groceries",
            "getting up early",
            "filing tax forms",
            "taking out the trash",
            "waiting on hold with customer service",
            "mowing the lawn",
        ],
    ),
    "food": (
        [
            "What does {} taste like?",
            "Is {} good for your health?",
            "Write a short opinion about {}.",
            "How would you serve {} to guests?",
        ],
        [
            "black coffee",
            "plain oatmeal",
            "spicy noodle soup",
            "frozen pizza",
            "dark chocolate",
            "blue cheese",
            "a boiled egg",
            "fast food hamburgers",
            "green salad",
            "homemade bread",
            "canned soup",
            "vanilla ice cream",
            "fried fish",
        ],
    ),
    "problems": (
        [
            "What should I do about {}?",
            "Why does {} happen so often?",
            "My friend is upset because of {}. What can I say?",
            "Tell me a short story about {}.",
        ],
        [
            "a flat tire",
            "a lost wallet",
            "a broken phone screen",
            "a loud neighbor",
            "a failed exam",
            "a missed flight",
            "a bad haircut",
            "a leaking roof",
            "an argument with a sister",
            "a delayed package",
            "a toothache",
            "a cancelled holiday",
            "a slow computer",
        ],
    ),
    "hobbies": (
        [
            "How can a beginner start with {}?",
            "Is {} worth the time and money?",
            "What can go wrong with {}?",
            "Why do some people love {}?",
        ],
        [
            "playing the guitar",
            "growing tomatoes",
            "running long distances",
            "learning a new language",
            "bird watching",
            "painting with watercolors",
            "collecting old coins",
            "baking cakes",
            "fishing in a lake",
            "playing chess",
            "hiking in the mountains",
            "writing poems",
            "riding a bicycle",
        ],
    ),
    "objects": (
        [
            "What is {} used for?",
            "Describe {} in your own words.",
            "Write a review of {} you bought last month.",
            "How do I choose {}?",
        ],
        [
            "an umbrella",
            "a wooden chair",
            "an alarm clock",
            "a vacuum cleaner",
            "a pair of running shoes",
            "a cheap laptop",
            "a wool sweater",
            "a kitchen knife",
            "a used car",
            "a desk lamp",
            "a washing machine",
            "a backpack",
            "a set of headphones",
        ],
    ),
    "ideas": (
        [
            "What is your opinion on {}?",
            "What are the downsides of {}?",
            "How does {} affect ordinary families?",
            "Explain {} in a few sentences.",
        ],
        [
            "working from home",
            "homework for young children",
            "keeping a dog in the city",
            "high rents in big cities",
            "social media",
            "growing older",
            "air pollution",
            "electric cars",
            "moving to another country",
            "losing a job",
            "night shift work",
            "living alone",
            "public transport",
        ],
    ),
}


def load_prompts(split: str) -> Dataset:
    """Build the prompts of a split.

    Args:
        split: `"train"` (320 prompts over 80 topics) or `"test"` (96 prompts over 24 other topics).

    Returns:
        A dataset with one column, `prompt`: `[{"role": "user", "content": ...}]`.
    """
    parts = {"train": slice(None, -TEST_TOPICS_PER_CATEGORY), "test": slice(-TEST_TOPICS_PER_CATEGORY, None)}
    questions = [
        form.format(topic) for forms, topics in CATEGORIES.values() for topic in topics[parts[split]] for form in forms
    ]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": question}] for question in questions]})
