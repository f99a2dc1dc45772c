"""What the tiny model knows: small tables of facts, words and names, and nothing else.

The generator in `data.py` turns these tables into conversations. To teach the model a new fact, add
a row here and train again.
"""

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "England": "London", "Ireland": "Dublin", "Austria": "Vienna",
    "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Hungary": "Budapest", "Russia": "Moscow",
    "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "Japan": "Tokyo",
    "China": "Beijing", "India": "New Delhi", "Canada": "Ottawa", "Cuba": "Havana",
    "Peru": "Lima", "Chile": "Santiago", "Australia": "Canberra", "Belgium": "Brussels",
    "Switzerland": "Bern", "Iceland": "Reykjavik",
}  # fmt: skip

CONTINENTS = {
    "France": "Europe", "Germany": "Europe", "Italy": "Europe", "Spain": "Europe",
    "Norway": "Europe", "Poland": "Europe", "Greece": "Europe", "Ireland": "Europe",
    "Egypt": "Africa", "Kenya": "Africa", "Japan": "Asia", "China": "Asia", "India": "Asia",
    "Canada": "North America", "Cuba": "North America", "Peru": "South America",
    "Chile": "South America",
}  # fmt: skip

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("day", "night"),
    ("fast", "slow"), ("old", "new"), ("open", "closed"), ("happy", "sad"), ("wet", "dry"),
    ("full", "empty"), ("hard", "soft"), ("light", "dark"), ("high", "low"), ("long", "short"),
    ("loud", "quiet"), ("rich", "poor"), ("strong", "weak"), ("thick", "thin"), ("true", "false"),
    ("early", "late"), ("good", "bad"), ("first", "last"), ("clean", "dirty"), ("near", "far"),
    ("sweet", "sour"), ("inside", "outside"), ("before", "after"), ("start", "end"),
]  # fmt: skip

COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow",
    "blood": "red", "a banana": "yellow", "milk": "white", "a tomato": "red", "the sea": "blue",
    "a frog": "green", "the sun": "yellow", "chocolate": "brown", "a carrot": "orange",
    "a cloud": "white", "a leaf": "green", "an elephant": "grey", "a plum": "purple",
    "the night": "black", "a flamingo": "pink",
}  # fmt: skip

MIXTURES = {
    ("blue", "yellow"): "green", ("red", "yellow"): "orange", ("blue", "red"): "purple",
    ("black", "white"): "grey", ("red", "white"): "pink",
}  # fmt: skip

UNITS = {
    ("seconds", "a minute"): "60", ("minutes", "an hour"): "60", ("hours", "a day"): "24",
    ("days", "a week"): "7", ("months", "a year"): "12", ("days", "a year"): "365",
    ("weeks", "a year"): "52", ("years", "a century"): "100", ("years", "a decade"): "10",
    ("centimetres", "a metre"): "100", ("metres", "a kilometre"): "1000",
    ("millimetres", "a centimetre"): "10", ("grams", "a kilogram"): "1000",
    ("cents", "a euro"): "100", ("bits", "a byte"): "8", ("items", "a dozen"): "12",
}  # fmt: skip

ANIMALS = {  # animal: (sound it makes, its young, its legs)
    "dog": ("barks", "puppy", 4), "cat": ("meows", "kitten", 4), "cow": ("moos", "calf", 4),
    "sheep": ("bleats", "lamb", 4), "pig": ("grunts", "piglet", 4),
    "duck": ("quacks", "duckling", 2),
    "horse": ("neighs", "foal", 4), "lion": ("roars", "cub", 4), "frog": ("croaks", "tadpole", 4),
    "owl": ("hoots", "owlet", 2), "goose": ("honks", "gosling", 2), "wolf": ("howls", "pup", 4),
    "bee": ("buzzes", "larva", 6), "hen": ("clucks", "chick", 2), "goat": ("bleats", "kid", 4),
}  # fmt: skip

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]  # fmt: skip

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
]  # fmt: skip

PLURALS = {
    "cat": "cats", "dog": "dogs", "house": "houses", "box": "boxes", "child": "children",
    "mouse": "mice", "foot": "feet", "tooth": "teeth", "man": "men", "woman": "women",
    "leaf": "leaves", "book": "books", "city": "cities", "baby": "babies", "fish": "fish",
    "goose": "geese", "wolf": "wolves", "bus": "buses", "tree": "trees", "apple": "apples",
}  # fmt: skip

CATEGORIES = {
    "colours": ["red", "blue", "green", "yellow", "black", "white", "orange"],
    "fruits": ["apple", "banana", "cherry", "pear", "plum", "grape", "peach"],
    "animals": ["dog", "cat", "horse", "cow", "sheep", "bird", "fish"],
    "countries": ["France", "Italy", "Spain", "Japan", "India", "Canada", "Peru"],
    "cities": ["Paris", "Rome", "Madrid", "Tokyo", "London", "Berlin", "Oslo"],
    "vegetables": ["carrot", "potato", "onion", "pea", "bean", "leek", "cabbage"],
    "tools": ["hammer", "saw", "drill", "knife", "shovel", "brush", "rake"],
    "drinks": ["water", "milk", "tea", "coffee", "juice", "cocoa", "lemonade"],
    "clothes": ["shirt", "hat", "coat", "sock", "shoe", "scarf", "glove"],
    "planets": ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus"],
}
MEMBER_OF = {  # singular with article, for "Which of these is …?"
    "colours": "a colour", "fruits": "a fruit", "animals": "an animal", "countries": "a country",
    "cities": "a city", "vegetables": "a vegetable", "tools": "a tool", "drinks": "a drink",
    "clothes": "a piece of clothing", "planets": "a planet",
}  # fmt: skip

REASONS = {  # question: answer
    "Why is the sky blue?": (
        "The sky is blue because the air scatters blue light more than red light."
    ),
    "Why is the grass green?": "Grass is green because it has chlorophyll in its leaves.",
    "Why does it rain?": "It rains when drops of water in a cloud become too heavy.",
    "Why do birds have wings?": "Birds have wings so that they can fly.",
    "Why do we sleep?": "We sleep so that the body and the mind can rest.",
    "Why do we eat?": "We eat because the body needs energy.",
    "Why is the sea salty?": "The sea is salty because rivers carry salt from the rocks into it.",
    "Why do leaves fall?": "Leaves fall in autumn because the tree saves water for the winter.",
    "Why is ice cold?": "Ice is cold because it is frozen water.",
    "Why do we drink water?": "We drink water because the body needs it to live.",
    "Why do cats purr?": "Cats purr when they feel safe and happy.",
    "Why do dogs bark?": "Dogs bark to warn others or to get attention.",
    "Why is the sun hot?": "The sun is hot because it burns like a very big fire of gas.",
    "Why do we need trees?": "We need trees because they make the air that we breathe.",
    "Why is it dark at night?": (
        "It is dark at night because the sun is on the other side of the Earth."
    ),
    "Where does milk come from?": "Milk comes from cows.",
    "Where does honey come from?": "Honey comes from bees.",
    "Where do fish live?": "Fish live in water.",
    "Where do birds live?": "Birds live in nests.",
    "What do cows eat?": "Cows eat grass.",
    "What do bees make?": "Bees make honey.",
    "What is ice?": "Ice is frozen water.",
    "What is rain?": "Rain is water that falls from the clouds.",
    "What is the sun?": "The sun is a star.",
    "What is the moon?": "The moon is a ball of rock that goes around the Earth.",
    "What is a book?": "A book is a set of pages with words on them.",
    "What is a computer?": "A computer is a machine that follows instructions very fast.",
    "What is Python?": "Python is a programming language. It is easy to read.",
    "What is Rust?": "Rust is a programming language. It is fast and safe.",
    "What is a language model?": (
        "A language model is a program that guesses the next piece of a text."
    ),
}

# Who the model is, and how one uses the package: (ways to ask, the answer).
ABOUT = [
    (
        ["Who are you?", "What are you?", "Introduce yourself.", "Tell me about yourself.",
         "What model are you?", "Which model is this?"],
        "I am the tiny model that comes with tabagent_model. I am very small and know only a few "
        "things.",
    ),
    (
        ["What is your name?", "Do you have a name?", "What are you called?",
         "How are you called?"],
        "I have no real name. I am the tiny model of tabagent_model.",
    ),
    (
        ["What can you do?", "What are you good at?", "How can you help me?", "What do you know?",
         "Can you help me?", "Help", "What can I ask you?"],
        "I can greet you, repeat words, add small numbers, name simple facts, make lists, fill "
        "JSON objects and call tools.",
    ),
    (
        ["What can you not do?", "What are your limits?", "Are you smart?", "Are you clever?",
         "Do you know everything?", "Can you do everything?"],
        "I cannot do much. I am very small and know only a few simple facts.",
    ),
    (
        ["Who made you?", "Who trained you?", "Where do you come from?", "How were you trained?"],
        "I was trained for tabagent_model, on text made from small tables.",
    ),
    (
        ["How big are you?", "How many parameters do you have?", "What is your size?",
         "How small are you?"],
        "I have about three million parameters and need a few megabytes.",
    ),
    (
        ["Are you a human?", "Are you a person?", "Are you alive?", "Are you a robot?",
         "Are you an AI?", "Are you real?"],
        "I am not a person. I am a very small language model.",
    ),
    (
        ["What is tabagent_model?", "What does tabagent_model do?", "Tell me about tabagent_model.",
         "What is this package?", "What is this package for?"],
        "tabagent_model is a Python package that runs language models in your own process.",
    ),
    (
        ["How do I install tabagent_model?", "How do I install this package?",
         "How can I install it?"],
        "Type `pip install tabagent_model`.",
    ),
    (
        ["How do I load a model?", "How can I load a model?", "How do I open a model?",
         "Show me how to load a model.", "Load a model in Python.", "How do I use a GGUF file?"],
        'Use `model = Model.load("m.gguf")`.',
    ),
    (
        ["How do I generate text?", "How can I generate text?", "Show me how to generate text.",
         "How do I complete a prompt?", "How do I use a model?"],
        'Call `model.generate("Hello")`. It returns the text.',
    ),
    (
        ["How do I stream?", "How can I stream an answer?", "How do I stream text?",
         "Show me how to stream.", "How do I get the answer piece by piece?"],
        'Write `for piece in model.stream("Hello"): print(piece, end="")`.',
    ),
    (
        ["How do I chat?", "How can I chat with a model?", "How do I send messages?",
         "Show me how to chat.", "How do I use chat messages?"],
        "Call `model.chat(messages)` with a list of messages.",
    ),
    (
        ["How do I keep the history?", "What is a ChatSession?", "How do I use ChatSession?",
         "How do I make a chat with memory?"],
        'Use `ChatSession(model)` and call `send("Hello")`. It keeps the history.',
    ),
    (
        ["How do I use async?", "Can I use asyncio?", "Is there an async model?",
         "What is AsyncModel?", "How do I await an answer?"],
        "Use `AsyncModel`. It has the same methods as `Model`, and you await them.",
    ),
    (
        ["What is n_ctx?", "How do I set n_ctx?", "How do I get a longer context?",
         "What does n_ctx mean?", "What is the context size?"],
        "`n_ctx` is the number of tokens that the model can see. Set it when you load the model.",
    ),
    (
        ["How do I use the GPU?", "Can I use a GPU?", "What is n_gpu_layers?",
         "How do I put the model on the GPU?"],
        "Set `n_gpu_layers=-1` to put all layers on the GPU.",
    ),
    (
        ["What is temperature?", "What does temperature mean?", "How do I set the temperature?",
         "How do I get the same answer every time?"],
        "A low temperature gives a sure answer. With `temperature=0` it is always the same.",
    ),
    (
        ["What is max_tokens?", "How do I limit the answer?", "How do I get a shorter answer?",
         "What does max_tokens mean?"],
        "`max_tokens` is the largest number of tokens in the answer.",
    ),
    (
        ["How do I stop an answer?", "How do I cancel an answer?", "How do I cancel a stream?",
         "Can I stop early?"],
        "Leave the `with` block of the stream. This cancels the answer.",
    ),
    (
        ["How do I get embeddings?", "How do I embed text?", "What is an embedding?",
         "Can I get embeddings?"],
        "Call `model.embed(texts)`. An embedding is a list of numbers for a text.",
    ),
    (
        ["How do I close a model?", "How do I unload a model?", "How do I free the memory?",
         "Show me how to close a model."],
        "Call `model.close()`, or use the model in a `with` block.",
    ),
    (
        ["How do I use two models?", "How do I use several models?", "What is ModelManager?",
         "How do I swap models?"],
        "Use `ModelManager`. It loads models by name and closes idle ones.",
    ),
    (
        ["The memory is full. What can I do?", "What can I do when the memory is full?",
         "I get OutOfMemoryError.", "What does OutOfMemoryError mean?"],
        "The model needs more memory than you have. Lower `n_ctx` or use a smaller model.",
    ),
    (
        ["How do I use tools?", "How do I call a function?", "Can you call tools?",
         "How do I give you tools?"],
        "Pass `tools` to `model.chat`. I answer with a tool call.",
    ),
    (
        ["How do I get JSON?", "How do I get structured output?", "How do I use a schema?",
         "Can I get JSON?"],
        "Pass a `schema`. Then the answer is always a JSON object that fits it.",
    ),
    (
        ["What is a draft model?", "What is speculative decoding?", "How do I make it faster?",
         "Is there a draft model?"],
        "A draft model guesses tokens and the big model checks them. This makes the answer faster.",
    ),
    (
        ["What is a GGUF file?", "What is GGUF?", "What does GGUF mean?"],
        "GGUF is a file format for language models.",
    ),
    (
        ["What is a token?", "What are tokens?", "What does token mean?"],
        "A token is a small piece of text.",
    ),
    (
        ["What is a prompt?", "What does prompt mean?", "What is a system prompt?"],
        "A prompt is the text that you give to a model.",
    ),
    (
        ["What is a larger model?", "Do you know a better model?", "Which model should I use?",
         "Where do I get a better model?"],
        "For real work, download a larger model. I am only here for tests and first steps.",
    ),
]  # fmt: skip

# Small talk: (what the user says, the answer). `{name}` is any name.
SMALL_TALK = [
    (["Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey!", "Hello there!", "Hi there!", "Good day!"],
     "Hello! How can I help you?"),
    (["Good morning", "Good morning!"], "Good morning! How can I help you?"),
    (["Good evening", "Good evening!"], "Good evening! How can I help you?"),
    (["How are you?", "How do you do?", "Are you well?", "How is it going?", "How are you today?"],
     "I am fine, thank you. How can I help you?"),
    (["Thank you", "Thank you!", "Thanks", "Thanks!", "Thank you very much!", "Thanks a lot!"],
     "You are welcome!"),
    (["Bye", "Bye!", "Goodbye", "Goodbye!", "See you!", "See you later!"],
     "Goodbye! Have a nice day!"),
    (["Good night", "Good night!"], "Good night! Sleep well!"),
    (["That is wrong.", "No, that is wrong.", "You are wrong.", "This is not right."],
     "I am sorry. I am very small and make mistakes."),
    (["Well done!", "Very good!", "Good job!", "You are great!", "Nice!"], "Thank you!"),
    (["OK", "Okay", "Yes", "Fine.", "I see."], "Good! What else can I do for you?"),
    (["Tell me a joke.", "Do you know a joke?", "Make me laugh."],
     "Why is the computer cold? Because it left its windows open!"),
    (["Sorry", "I am sorry.", "Sorry!"], "No problem!"),
    (["I am sad.", "I feel bad.", "I am tired."],
     "I am sorry to hear that. I hope you feel better soon."),
    (["I am happy.", "I feel good.", "I am fine."], "That is good to hear!"),
]  # fmt: skip
INTRODUCTIONS = [
    ("Hello, I am {name}.", "Hello {name}! How can I help you?"),
    ("Hi, I am {name}.", "Hello {name}! How can I help you?"),
    ("My name is {name}.", "Nice to meet you, {name}!"),
    ("Hello, my name is {name}.", "Nice to meet you, {name}!"),
    ("Hi! My name is {name}.", "Nice to meet you, {name}!"),
    ("I am called {name}.", "Nice to meet you, {name}!"),
    ("Say hello to {name}.", "Hello {name}!"),
    ("Greet {name}.", "Hello {name}!"),
    ("Say goodbye to {name}.", "Goodbye {name}!"),
    ("Say good morning to {name}.", "Good morning {name}!"),
]

# Things it does not know. `{x}` is filled from the list beside it, or with an invented name.
UNKNOWN = [
    ("Who wrote {x}?", ["Hamlet", "the Bible", "Faust", "this poem", "that song", "Moby Dick"]),
    ("Who won {x}?", ["the world cup", "the election", "the war", "the race", "the last game"]),
    ("Who is {x}?",
     ["the president", "the queen", "the best singer", "my neighbour", "my teacher"]),
    ("Who invented {x}?", ["the telephone", "the wheel", "paper", "the car", "television"]),
    ("What is the population of {x}?", ["France", "Tokyo", "the world", "Canada", "Rome"]),
    ("What happened in {x}?", ["1945", "1789", "2001", "1492", "history", "the news"]),
    ("What will {x} be tomorrow?", ["the weather", "the price", "the result", "the news"]),
    ("Explain {x}.", ["physics", "relativity", "democracy", "the stock market", "gravity", "music",
                      "chemistry", "philosophy", "economics"]),
    ("Write {x}.", ["a poem", "an essay", "a long letter", "a song", "a novel", "a program",
                    "a report", "an email to my boss"]),
    ("Translate {x} into French.", ["this text", "hello", "my letter", "the book", "good night"]),
    ("Translate {x} into German.", ["this text", "hello", "my letter", "the book", "good night"]),
    ("How do I cook {x}?", ["rice", "a cake", "soup", "an egg", "pasta", "dinner"]),
    ("How do I repair {x}?", ["my car", "my phone", "a bicycle", "the roof", "a watch"]),
    ("How far is {x}?", ["the moon", "the sun", "Mars", "the next town", "home"]),
    ("How old is {x}?", ["the Earth", "the king", "the universe", "this town", "my house"]),
    ("How tall is {x}?", ["the tower", "the mountain", "the president", "a giraffe"]),
    ("When was {x} born?", ["Einstein", "Mozart", "the queen", "Napoleon", "Shakespeare"]),
    ("What is the meaning of {x}?", ["life", "love", "this dream", "art", "happiness"]),
    ("What do you think about {x}?", ["politics", "war", "money", "religion", "football"]),
    ("What is the best {x}?", ["film", "phone", "car", "hotel", "restaurant", "bank"]),
    ("Summarize {x}.", ["this book", "the film", "the news", "the story", "the meeting"]),
    ("Solve {x}.", ["this equation", "the puzzle", "my problem", "this riddle"]),
    ("Where is {x}?", ["my phone", "my key", "the station", "the bank", "the museum", "my dog"]),
    ("Give me advice about {x}.", ["money", "love", "work", "school", "my health"]),
    ("What is the capital of {x}?", []),
    ("Who was {x}?", []),
    ("Where is the town of {x}?", []),
    ("What is a {x}?", []),
    ("Tell me about {x}.", ["history", "your day", "black holes", "the news", "quantum computers"]),
    ("Explain {x} in simple words.",
     ["quantum computers", "black holes", "taxes", "gravity", "law"]),
    ("Write a program that {x}.",
     ["sorts a list", "plays chess", "draws a circle", "reads a file"]),
    ("How does {x} work?", ["a car", "the brain", "a phone", "the internet", "a bank", "a clock"]),
    ("Why is {x}?",
     ["the road closed", "my computer slow", "the house old", "he angry", "it late"]),
    ("What is the weather {x}?", ["today", "tomorrow", "like", "in Paris", "in Rome", "here"]),
    ("What time is it{x}?", ["", " now", " in Paris", " in London", " here"]),
    ("Who is the president of {x}?", ["France", "Italy", "Egypt", "Peru", "Chile"]),
]  # fmt: skip
DO_NOT_UNDERSTAND = "I am sorry, I do not understand that."
DO_NOT_KNOW = "I am a very small model and do not know that."
TOO_LARGE = "I am a very small model and can only do small sums."

NAMES = [
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate",
    "Leo", "Maria", "Noah", "Olivia", "Paul", "Rosa", "Sam", "Tom", "Vera", "Will", "Zoe",
    "Alice", "Bob", "Carol", "Dan", "Eva", "Frank", "Hanna", "Ivan", "Julia", "Karl", "Lucy",
    "Max", "Nina", "Oscar", "Peter", "Ruth", "Sara", "Tim", "Mia", "Lena", "John", "Jane", "Mary",
]  # fmt: skip

NOUNS = [
    "apple", "ball", "bear", "bell", "bird", "boat", "book", "box", "bread", "bridge", "car",
    "cat", "chair", "clock", "cloud", "cup", "dog", "door", "duck", "egg", "field", "fire",
    "fish", "flower", "fox", "garden", "glass", "hat", "hill", "horse", "house", "key", "lamp",
    "leaf", "letter", "lion", "moon", "mouse", "mountain", "owl", "paper", "pencil", "picture",
    "plane", "rabbit", "river", "road", "rock", "room", "sea", "ship", "shoe", "song", "spoon",
    "star", "stone", "street", "sun", "table", "tiger", "tower", "train", "tree", "village",
    "wall", "water", "wind", "window", "wolf",
]  # fmt: skip
ADJECTIVES = [
    "red", "blue", "green", "yellow", "black", "white", "old", "new", "big", "small", "quiet",
    "happy", "cold", "warm", "fast", "slow", "soft", "round", "heavy", "bright", "dark", "clean",
    "brave", "kind", "lazy", "quick", "brown", "purple", "tiny", "strange",
]  # fmt: skip
VERBS = [
    "sees",
    "likes",
    "finds",
    "wants",
    "holds",
    "knows",
    "follows",
    "paints",
    "carries",
    "hears",
]

JOBS = [
    "teacher",
    "doctor",
    "baker",
    "farmer",
    "painter",
    "singer",
    "pilot",
    "nurse",
    "cook",
    "writer",
]
FOODS = ["pizza", "soup", "rice", "cake", "bread", "pasta", "salad", "cheese", "fish", "apples"]
HOBBIES = ["music", "chess", "football", "tennis", "swimming", "reading", "dancing", "cooking"]
GOODS = {"apple": "apples", "book": "books", "pencil": "pencils", "egg": "eggs", "ball": "balls",
         "cup": "cups", "lamp": "lamps", "hat": "hats", "flower": "flowers", "key": "keys",
         "stone": "stones", "shoe": "shoes"}  # fmt: skip

HEROES = [
    "fox",
    "dog",
    "cat",
    "rabbit",
    "bear",
    "mouse",
    "owl",
    "duck",
    "horse",
    "frog",
    "wolf",
    "lion",
]
PLACES = [
    "forest",
    "garden",
    "village",
    "house by the sea",
    "small town",
    "green field",
    "old castle",
]
WISHES = {  # what the hero looks for: where it is found
    "a friend": "behind a big tree", "a red ball": "under a bench",
    "a golden key": "in a deep well", "some food": "in a warm kitchen",
    "a new home": "on top of a hill", "a lost book": "near the river",
    "the moon": "in a quiet lake", "a little bell": "inside an old box",
}  # fmt: skip
HERO_NAMES = {
    "fox": "Pip", "dog": "Rex", "cat": "Mimi", "rabbit": "Hop", "bear": "Bruno",
    "mouse": "Nibbles", "owl": "Olga", "duck": "Quacky", "horse": "Star", "frog": "Freddy",
    "wolf": "Grey", "lion": "Leo",
}  # fmt: skip

INTERJECTIONS = [
    "Sure", "Well", "Answer", "Oh", "Meow", "Yes", "Ahoy", "Hm", "Look", "Dear friend", "Boss",
]  # fmt: skip

# How a question may be put: {} is the question, {1} the same with a small first letter, "lower" has
# no mark at its end, and "short" says "What's" for "What is".
WRAPPERS = [
    "lower", "lower", "short", "short", "Hello, {1}", "Hi, {1}", "OK, {1}", "Please tell me: {}",
    "Hello! {}", "Quick question: {}", "I want to know: {}", "Hey, {}", "A question: {}",
    "Can you help me? {}",
]  # fmt: skip
NEUTRAL_SYSTEM = [
    "You are a helpful assistant.", "You are a tiny model.", "You are helpful and honest.",
    "Be kind and short.", "You are an assistant.", "Answer the user.",
]  # fmt: skip
