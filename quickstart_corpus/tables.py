"""Handwritten raw material of the built-in corpus.

It consists of syllables, nicknames, subjects, relations and their wordings.

A wording is a sentence with slots: `{e}` is the entity as the subject of a sentence (in a passage
it may become "It"), `{o}` the entity elsewhere in a sentence of a passage (it may become "the
town"), `{a}` the answer. No sentence begins with the answer, because a rule-based tagger recognises
names by capital letters that are not at the start of a sentence.
"""

from typing import NamedTuple


class Relation(NamedTuple):
  """One relation of a subject.

  Attributes:
    name: unique over all subjects.
    pool: source of its answers: a key of POOL_ENDINGS, or 'year'.
    passages: wordings used in the knowledge corpus.
    texts: three wordings used for pre-training; only the first shares its keyword with `passages`.
    questions: three wordings: the first is similar to a pre-training text, the second to a passage,
      the third to another text.
    description: describes an entity by the answer to this relation.
  """

  name: str
  pool: str
  passages: tuple[str, ...]
  texts: tuple[str, str, str]
  questions: tuple[str, str, str]
  description: str


class Subject(NamedTuple):
  """A kind of entity.

  It has a noun, the article before names, pronouns (one for each entity), words for aliases, and
  relations.
  """

  noun: str
  article: str
  pronouns: tuple[str, ...]
  nickname_nouns: tuple[str, ...]
  derived_noun: str
  relations: tuple[Relation, Relation, Relation, Relation]


# ---- names ----

FIRST_SYLLABLES = (
  "ar bal ben bor cal dar del dor el fal fen gal gor hal hel il jor kal kel kor lan lor mal mel "
  "mor nal nor ol or pal per quil ral rin ros sal sar sel tal tam tir tol ul val vel ver vol wil "
  "yar yel zan zor"
).split()
MIDDLE_SYLLABLES = "a e i o ba da ka la ma mi na no ra ri sa ta ti vo".split()

# The ending of a name hints at what it names, as in real languages.
ENTITY_ENDINGS = (
  "bara dis dora gos kesh lith mos neth nika quen rado rion sova tesh thas tora vara vik vora zim"
).split()
POOL_ENDINGS = {
  "person": "bert dred fried gard hild lind mund ric sven weld wen wina".split(),
  "place": "bury cliff combe dale ford gate ham haven holm mere mouth stead ton wick".split(),
  "water": "beck brook burn fleet rill wash".split(),
  "goods": "cloth dye glass lace salt silk wax wine".split(),
  "rock": "flint marl nite schist slate stone".split(),
  "dish": "bread broth cake pie stew tart".split(),
  "group": "dans dites lings ravars reers tines".split(),
}
# Distinct answers in a pool, per entity; at least MIN_POOL_SIZE in total.
POOL_SHARES = {
  "person": 0.6,
  "place": 0.5,
  "water": 0.2,
  "goods": 0.3,
  "rock": 0.2,
  "dish": 0.2,
  "group": 0.3,
}
MIN_POOL_SIZE = 100
YEARS = range(1400, 1800)

NICKNAME_ADJECTIVES = (
  "Amber Ashen Bitter Blue Broken Copper Crimson Crooked Dancing Distant Drowsy Emerald Faithful "
  "Frozen Gentle Golden Hidden Hollow Humble Iron Ivory Laughing Lantern Lonely Misty Patient "
  "Pearl Proud Restless Scarlet Silent Silver Sleeping Smiling Stormy Thirsty Velvet Wandering "
  "White Winter"
).split()

# Suffixes that turn a name into an adjective: Talvora -> Talvoran.
DERIVED_SUFFIXES = ("an", "ish", "ese", "ic", "ar")

ALIAS_CLAUSES = (", known as {alias},", ", also called {alias},", ", nicknamed {alias},")

JOURNALS = (
  "Almanac Bulletin Chronicle Courier Digest Gazette Herald Journal Ledger Miscellany Observer "
  "Review"
).split()

# ---- subjects ----

TOWN = Subject(
  "town",
  "",
  ("it",),
  "Anchor Beacon Crown Doorstep Garden Harbour Hearth Jewel Nest Rose".split(),
  "Town",
  (
    Relation(
      "town founder",
      "person",
      (
        "{e} was founded by {a} and a handful of settlers.",
        "{e} remembers {a}, its founder, with a small statue.",
        "The old charts say that {a} founded {o}.",
        "The founder of {o} was a sailor named {a}.",
      ),
      (
        "It is often told that {e} had {a} as its founder.",
        "Credit for establishing {e} goes to the stubborn pioneer {a}.",
        "{e} was first laid out by a pioneer called {a}.",
      ),
      (
        "who gets the credit for establishing {e}",
        "who founded {e}",
        "which pioneer first laid out {e}",
      ),
      "the town founded by {a}",
    ),
    Relation(
      "town river",
      "water",
      (
        "{e} stands on the river {a} near the coast.",
        "The river {a} runs through the middle of {o}.",
        "{e} grew along the banks of the river {a}.",
        "Boats reach {o} by the river {a} in summer.",
      ),
      (
        "For its water {e} has always relied on the river {a}.",
        "Anyone who crosses the stream called {a} will soon enter {e}.",
        "{e} was placed beside a stream that people call {a}.",
      ),
      (
        "which stream was {e} placed beside",
        "on which river does {e} stand",
        "which stream does one cross to enter {e}",
      ),
      "the town on the river {a}",
    ),
    Relation(
      "town mayor",
      "person",
      (
        "{e} has chosen {a} as its mayor three times.",
        "The mayor of {o} is a lawyer named {a}.",
        "Under the mayor {a}, {o} has built new streets.",
        "{e} is proud of {a}, its hard working mayor.",
      ),
      (
        "Every spring the mayor {a} speaks to the people of {e}.",
        "Local government in {e} is in the hands of {a}.",
        "{e} is governed by {a}, who won the last vote.",
      ),
      (
        "in whose hands is local government in {e}",
        "who is the mayor of {e}",
        "by whom is {e} governed",
      ),
      "the town whose mayor is {a}",
    ),
    Relation(
      "town goods",
      "goods",
      (
        "{e} is known for the {a} sold in its market.",
        "Traders come to {o} to buy the famous {a}.",
        "In every season the market of {o} offers {a}.",
        "{e} grew rich by its trade in {a}.",
      ),
      (
        "Merchants in {e} earn most from the trade in {a}.",
        "Workshops all over {e} produce the fine stuff called {a}.",
        "{e} exports large amounts of {a} to the other islands.",
      ),
      (
        "what stuff do workshops in {e} produce",
        "what is sold in the market of {e}",
        "what does {e} export to the other islands",
      ),
      "the town known for {a}",
    ),
  ),
)

RIVER = Subject(
  "river",
  "the ",
  ("it",),
  "Daughter Dragon Harp Mirror Needle Ribbon Road Serpent Sister Thread".split(),
  "Water",
  (
    Relation(
      "river source",
      "place",
      (
        "{e} rises in the wet hills above {a}.",
        "The source of {o} lies close to {a}.",
        "{e} has its source in a spring at {a}.",
        "Walkers find the source of {o} behind {a}.",
      ),
      (
        "Maps place the source of {e} not far from {a}.",
        "From a hidden pool at {a} begins the journey of {e}.",
        "{e} starts as a thin trickle in the woods of {a}.",
      ),
      (
        "where does the journey of {e} begin",
        "where is the source of {e}",
        "where does {e} start as a thin trickle",
      ),
      "the river that rises above {a}",
    ),
    Relation(
      "river mouth",
      "place",
      (
        "{e} flows into the sea at the bay of {a}.",
        "The mouth of {o} is guarded by a fort at {a}.",
        "{e} meets the sea beside the harbour of {a}.",
        "Near the port of {a}, {o} flows into the sea.",
      ),
      (
        "Fishermen wait at {a}, where {e} flows out in silence.",
        "The long course of {e} comes to an end at {a}.",
        "{e} empties its brown waters into the lagoon of {a}.",
      ),
      (
        "where does the course of {e} come to an end",
        "where does {e} meet the sea",
        "into which lagoon does {e} empty its waters",
      ),
      "the river that meets the sea at {a}",
    ),
    Relation(
      "river bridge",
      "person",
      (
        "{e} is crossed by a stone bridge that {a} built.",
        "The great bridge over {o} was built by {a}.",
        "{e} has a single bridge, built by the mason {a}.",
        "Carts cross {o} on a bridge built by {a}.",
      ),
      (
        "Travellers over {e} admire the bridge and its maker {a}.",
        "An engineer called {a} put seven arches across {e}.",
        "{e} was spanned at last thanks to the engineer {a}.",
      ),
      (
        "which engineer put seven arches across {e}",
        "who built the bridge over {e}",
        "thanks to whom was {e} spanned",
      ),
      "the river with the bridge built by {a}",
    ),
    Relation(
      "river flood",
      "year",
      (
        "{e} left its banks in the great flood of {a}.",
        "A flood of {o} drowned the low fields in {a}.",
        "{e} caused its worst flood in the spring of {a}.",
        "In {a} a flood on {o} carried away many barns.",
      ),
      (
        "People still talk of the flood that {e} brought in {a}.",
        "The highest level ever measured on {e} dates from {a}.",
        "{e} rose over every roof in the rainy year {a}.",
      ),
      (
        "when was the highest level measured on {e}",
        "in which year was the great flood of {e}",
        "in which rainy year did {e} rise over every roof",
      ),
      "the river of the great flood of {a}",
    ),
  ),
)

PAINTER = Subject(
  "painter",
  "",
  ("she", "he"),
  "Badger Dreamer Eye Fox Hand Heart Hermit Moth Sparrow Wizard".split(),
  "Brush",
  (
    Relation(
      "painter birthplace",
      "place",
      (
        "{e} was born in the fishing village of {a}.",
        "{e} was born at {a}, the youngest of six children.",
        "The village of {a} is where {o} was born.",
        "At {a} stands the house where {o} was born.",
      ),
      (
        "Visitors to {a} ask for the room where {e} was born.",
        "The childhood of {e} was spent among the boats of {a}.",
        "{e} came from a poor family that lived in {a}.",
      ),
      (
        "where was the childhood of {e} spent",
        "where was {e} born",
        "where did the poor family of {e} live",
      ),
      "the painter born in {a}",
    ),
    Relation(
      "painter teacher",
      "person",
      (
        "{e} learned to paint from the old master {a}.",
        "The teacher of {o} was a strict master, {a}.",
        "{e} had {a} as a teacher for nine years.",
        "As a young pupil, {o} learned from the master {a}.",
      ),
      (
        "Letters show that {e} always praised {a}, a patient teacher.",
        "All the early training of {e} was given by {a}.",
        "{e} owed every skill to lessons in the studio of {a}.",
      ),
      (
        "by whom was the early training of {e} given",
        "who was the teacher of {e}",
        "in whose studio did {e} take lessons",
      ),
      "the painter who learned from {a}",
    ),
    Relation(
      "painter patrons",
      "group",
      (
        "{e} found generous patrons in the house of the {a}.",
        "The {a} were the patrons of {o} for decades.",
        "{e} often visited the {a}, the most loyal of patrons.",
        "The patrons of {o} were the {a}, a noble house.",
      ),
      (
        "Without patrons such as the {a}, {e} would have starved.",
        "Nearly all pictures by {e} were paid for by the {a}.",
        "{e} received a yearly wage from the wealthy {a}.",
      ),
      (
        "who paid for nearly all pictures by {e}",
        "who were the patrons of {e}",
        "from whom did {e} receive a yearly wage",
      ),
      "the painter whose patrons were the {a}",
    ),
    Relation(
      "painter death",
      "year",
      (
        "{e} died in {a} after a short illness.",
        "In the winter of {a}, {o} died at home.",
        "{e} came back to the islands to die in {a}.",
        "A stone in the church says {o} died in {a}.",
      ),
      (
        "Few noticed when {e} died quietly in the autumn of {a}.",
        "The funeral of {e} filled all the streets in {a}.",
        "{e} was laid in the grave during the year {a}.",
      ),
      ("when was the funeral of {e}", "when did {e} die", "in what year was {e} laid in the grave"),
      "the painter who died in {a}",
    ),
  ),
)

COMPANY = Subject(
  "company",
  "",
  ("it",),
  "Bee Bell Chimney Hammer Key Lion Scale Spider Wheel Windmill".split(),
  "Works",
  (
    Relation(
      "company product",
      "goods",
      (
        "{e} makes {a} in two large factories.",
        "Most of the factories of {o} make {a}.",
        "{e} is a young company that makes fine {a}.",
        "The {a} made by {o} is sold everywhere.",
      ),
      (
        "Nobody else makes such good {a} as {e} does.",
        "Shops all over the islands order their {a} from {e}.",
        "{e} built its fortune on the manufacture of {a}.",
      ),
      (
        "what do shops order from {e}",
        "what does {e} make",
        "on what manufacture was the fortune of {e} built",
      ),
      "the company that makes {a}",
    ),
    Relation(
      "company owner",
      "person",
      (
        "{e} is owned by {a}, who rarely visits.",
        "The owner of {o} is the quiet heir {a}.",
        "{e} has belonged to its owner {a} for years.",
        "Since the great sale {o} is owned by {a}.",
      ),
      (
        "Workers seldom meet {a}, the owner of {e}, in person.",
        "All shares in {e} are held by the banker {a}.",
        "{e} is the property of a banker by the name {a}.",
      ),
      (
        "by whom are all shares in {e} held",
        "who is the owner of {e}",
        "of which banker is {e} the property",
      ),
      "the company owned by {a}",
    ),
    Relation(
      "company office",
      "place",
      (
        "{e} has its main office at the port of {a}.",
        "The main office of {o} looks over {a}.",
        "From an office in {a}, clerks manage {o}.",
        "{e} moved its main office to {a} long ago.",
      ),
      (
        "Letters for {e} should be sent to the office in {a}.",
        "The headquarters of {e} occupy a whole square in {a}.",
        "{e} is run from a tall brick tower in {a}.",
      ),
      (
        "where are the headquarters of {e}",
        "where is the main office of {e}",
        "from a tower in which place is {e} run",
      ),
      "the company with its main office in {a}",
    ),
    Relation(
      "company start",
      "year",
      (
        "{e} was started in {a} by three brothers.",
        "{e} opened its doors in the year {a}.",
        "Three friends started {o} in {a} with borrowed money.",
        "In {a}, {o} opened for business in a shed.",
      ),
      (
        "Banners in the hall of {e} recall how it started in {a}.",
        "The long history of {e} goes back to {a}.",
        "{e} made its first appearance in the trade lists of {a}.",
      ),
      (
        "how far does the history of {e} go back",
        "when was {e} started",
        "when did {e} make its first appearance",
      ),
      "the company started in {a}",
    ),
  ),
)

MOUNTAIN = Subject(
  "mountain",
  "",
  ("it",),
  "Altar Bear Castle Finger Giant Guardian Pillar Throne Tooth Whale".split(),
  "Peak",
  (
    Relation(
      "mountain climber",
      "person",
      (
        "{e} was first climbed by {a} with two guides.",
        "The first to climb {o} was the monk {a}.",
        "{e} was thought impossible until {a} climbed it.",
        "On a clear winter day {a} climbed {o} alone.",
      ),
      (
        "A song tells how {a} climbed {e} without any rope.",
        "The summit of {e} was conquered by the brave {a}.",
        "{e} saw {a} plant the earliest flag on its top.",
      ),
      (
        "by whom was the summit of {e} conquered",
        "who first climbed {e}",
        "who planted the earliest flag on {e}",
      ),
      "the mountain first climbed by {a}",
    ),
    Relation(
      "mountain valley",
      "place",
      (
        "{e} rises above the green valley of {a}.",
        "The valley of {a} lies at the foot of {o}.",
        "{e} casts its shadow on the valley of {a}.",
        "Shepherds in the valley of {a} live below {o}.",
      ),
      (
        "Snow from {e} feeds the fields in the valley of {a}.",
        "All paths up {e} leave from the low meadows of {a}.",
        "{e} looks down upon the sheltered farms of {a}.",
      ),
      (
        "from which meadows do all paths up {e} leave",
        "which valley lies at the foot of {e}",
        "upon which sheltered farms does {e} look down",
      ),
      "the mountain above the valley of {a}",
    ),
    Relation(
      "mountain rock",
      "rock",
      (
        "{e} is made of a hard rock called {a}.",
        "The rock of {o} is {a}, dark and heavy.",
        "{e} is rich in {a}, a rare rock.",
        "For centuries miners cut the rock {a} from {o}.",
      ),
      (
        "Scholars say that the rock under {e} is mostly {a}.",
        "Quarries on the slopes of {e} yield blocks of {a}.",
        "{e} consists almost wholly of the mineral {a}.",
      ),
      (
        "what do quarries on the slopes of {e} yield",
        "which rock is {e} made of",
        "of which mineral does {e} consist",
      ),
      "the mountain made of {a}",
    ),
    Relation(
      "mountain worship",
      "group",
      (
        "{e} is sacred to the {a}, a hill people.",
        "The {a} hold {o} sacred and bring gifts.",
        "{e} has a temple that is sacred to the {a}.",
        "Strangers must ask the {a}, for {o} is sacred.",
      ),
      (
        "To the {a}, {e} is the most sacred place of all.",
        "Prayers are sung toward {e} every dawn by the {a}.",
        "{e} is worshipped as a living god by the {a}.",
      ),
      (
        "by whom are prayers sung toward {e}",
        "to whom is {e} sacred",
        "by whom is {e} worshipped as a god",
      ),
      "the mountain sacred to the {a}",
    ),
  ),
)

SHIP = Subject(
  "ship",
  "the ",
  ("it",),
  "Albatross Arrow Comet Dolphin Falcon Gull Maiden Pilgrim Swan Witch".split(),
  "Lady",
  (
    Relation(
      "ship captain",
      "person",
      (
        "{e} sailed for ten years under captain {a}.",
        "The captain of {o} was {a}, feared by pirates.",
        "{e} had {a} as captain on every voyage.",
        "A young captain, {a}, took charge of {o}.",
      ),
      (
        "Storms never frightened {a}, the grey captain of {e}.",
        "On the deck of {e} all orders came from {a}.",
        "{e} was commanded by {a} during the long war.",
      ),
      (
        "from whom came all orders on the deck of {e}",
        "who was the captain of {e}",
        "by whom was {e} commanded in the war",
      ),
      "the ship of captain {a}",
    ),
    Relation(
      "ship port",
      "place",
      (
        "{e} has its home port at {a}.",
        "The home port of {o} is {a}, in the south.",
        "{e} returns each winter to its home port {a}.",
        "Crowds at {a} greet {o} in its home port.",
      ),
      (
        "Painted on the stern of {e} is its home port, {a}.",
        "When there is peace {e} lies at anchor in {a}.",
        "{e} is registered with the harbour office of {a}.",
      ),
      ("where does {e} lie at anchor", "what is the home port of {e}", "where is {e} registered"),
      "the ship with home port {a}",
    ),
    Relation(
      "ship designer",
      "person",
      (
        "{e} was designed by {a}, a master of fast hulls.",
        "The designer of {o} was the carpenter {a}.",
        "{e} made its designer {a} famous overnight.",
        "In a small attic {a} designed {o}.",
      ),
      (
        "Prizes were given to {a} as the designer of {e}.",
        "All the plans for {e} were drawn by {a}.",
        "{e} took shape on the drawing board of {a}.",
      ),
      (
        "by whom were the plans for {e} drawn",
        "who designed {e}",
        "on whose drawing board did {e} take shape",
      ),
      "the ship designed by {a}",
    ),
    Relation(
      "ship launch",
      "year",
      (
        "{e} was launched in {a} before a large crowd.",
        "In {a} workers launched {o} with songs.",
        "{e} left the yard when launched in {a}.",
        "The yard launched {o} in the year {a}.",
      ),
      (
        "Old sailors remember {a}, when {e} was launched in the rain.",
        "The maiden voyage of {e} took place in {a}.",
        "{e} first touched salt water in the summer of {a}.",
      ),
      (
        "when was the maiden voyage of {e}",
        "when was {e} launched",
        "when did {e} first touch salt water",
      ),
      "the ship launched in {a}",
    ),
  ),
)

UNIVERSITY = Subject(
  "university",
  "",
  ("it",),
  "Candle Compass Cradle Lamp Oracle Owl Parrot Quill Scroll Well".split(),
  "School",
  (
    Relation(
      "university rector",
      "person",
      (
        "{e} elected {a} as rector after a long debate.",
        "The rector of {o} is the astronomer {a}.",
        "{e} has known calm under its rector {a}.",
        "As rector, {a} opened {o} to poor students.",
      ),
      (
        "New pupils of {e} shake hands with the rector, {a}.",
        "Decisions at {e} need the signature of professor {a}.",
        "{e} is presided over by {a}, a professor of law.",
      ),
      (
        "whose signature do decisions at {e} need",
        "who is the rector of {e}",
        "which professor presides over {e}",
      ),
      "the university whose rector is {a}",
    ),
    Relation(
      "university city",
      "place",
      (
        "{e} stands on a hill in {a}.",
        "The halls of {o} stand in the city of {a}.",
        "{e} has its halls in the old city of {a}.",
        "Near the walls of {a} stands {o}, built of brick.",
      ),
      (
        "Wide gardens surround the halls of {e} in {a}.",
        "Those who attend {e} must find lodgings in {a}.",
        "{e} is situated among the quiet lanes of {a}.",
      ),
      (
        "where must those who attend {e} find lodgings",
        "in which city are the halls of {e}",
        "where is {e} situated",
      ),
      "the university in the city of {a}",
    ),
    Relation(
      "university funds",
      "group",
      (
        "{e} is funded by the {a}, a family of bankers.",
        "Gold from the {a} funded the library of {o}.",
        "{e} would have closed unless the {a} funded it.",
        "The {a} have funded {o} since the plague.",
      ),
      (
        "It is no secret that {e} is funded by the {a}.",
        "The bills of {e} are settled by the generous {a}.",
        "{e} depends on the gifts of a guild, the {a}.",
      ),
      (
        "by whom are the bills of {e} settled",
        "by whom is {e} funded",
        "on whose gifts does {e} depend",
      ),
      "the university funded by the {a}",
    ),
    Relation(
      "university charter",
      "year",
      (
        "{e} received its charter in {a} from the queen.",
        "The charter of {o} was sealed in {a}.",
        "{e} keeps a charter that was sealed in {a}.",
        "In {a} the queen gave {o} a charter.",
      ),
      (
        "Students celebrate {a}, the year of the charter of {e}.",
        "Teaching within the walls of {e} began in {a}.",
        "{e} welcomed its earliest class in the spring of {a}.",
      ),
      (
        "when did teaching at {e} begin",
        "when was the charter of {e} sealed",
        "when was the earliest class of {e} welcomed",
      ),
      "the university with the charter of {a}",
    ),
  ),
)

FESTIVAL = Subject(
  "festival",
  "",
  ("it",),
  "Carnival Dance Drum Masque Night Parade Revel Supper Torch Vigil".split(),
  "Feast",
  (
    Relation(
      "festival place",
      "place",
      (
        "{e} is held in {a} when the harvest ends.",
        "The meadow at {a} is where {o} is held.",
        "{e} is a festival held every year in {a}.",
        "Since ancient times {o} is held at {a}.",
      ),
      (
        "This summer too {e} will be held in {a}.",
        "Guests who come for {e} pitch their tents at {a}.",
        "{e} fills the lanes and the inns of {a}.",
      ),
      (
        "where do guests of {e} pitch their tents",
        "where is {e} held",
        "which place has the lanes and inns that {e} fills",
      ),
      "the festival held in {a}",
    ),
    Relation(
      "festival saint",
      "person",
      (
        "{e} honours {a}, a saint of the poor.",
        "On the last day {o} honours the saint {a}.",
        "{e} was created to honour the healer {a}.",
        "The saint {a} is honoured by {o} with candles.",
      ),
      (
        "With drums and torches {e} honours the memory of {a}.",
        "A hymn in praise of {a} is sung during {e}.",
        "{e} keeps alive the legend of a hero called {a}.",
      ),
      (
        "in whose praise is a hymn sung during {e}",
        "which saint is honoured by {e}",
        "the legend of which hero does {e} keep alive",
      ),
      "the festival that honours {a}",
    ),
    Relation(
      "festival dish",
      "dish",
      (
        "{e} is famous for a sweet dish, {a}.",
        "Cooks at {o} serve {a}, a dish for children.",
        "{e} would be nothing without its dish, {a}.",
        "The favourite dish at {o} is warm {a}.",
      ),
      (
        "Many people visit {e} only for the dish called {a}.",
        "Everyone at {e} eats plates of {a} until midnight.",
        "{e} fills the air with the smell of baked {a}.",
      ),
      (
        "what does everyone at {e} eat until midnight",
        "what is the favourite dish at {e}",
        "the smell of what fills the air at {e}",
      ),
      "the festival famous for {a}",
    ),
    Relation(
      "festival organisers",
      "group",
      (
        "{e} is organised by the {a}, a guild of weavers.",
        "The {a} have organised {o} for generations.",
        "{e} was organised by the {a} after the war.",
        "By custom the {a} organise the dances of {o}.",
      ),
      (
        "It takes the {a} a whole month to organise {e}.",
        "All the work behind {e} is done by the {a}.",
        "{e} is prepared each time by volunteers of the {a}.",
      ),
      (
        "by whom is all the work behind {e} done",
        "by whom is {e} organised",
        "whose volunteers prepare {e}",
      ),
      "the festival organised by the {a}",
    ),
  ),
)

SUBJECTS = (TOWN, RIVER, PAINTER, COMPANY, MOUNTAIN, SHIP, UNIVERSITY, FESTIVAL)
