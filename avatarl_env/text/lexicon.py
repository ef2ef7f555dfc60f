"""Words, persons and sentence patterns of the embedded play, all of our own making.

The patterns are a context-free grammar. An alternative is text with symbols in braces; ``|`` stands
between alternatives, ``/`` is a line break, ``()`` is the empty text, a leading number is a weight
(1 if absent). Two prefixes change the word that a symbol gives: ``{^X}`` begins with a capital,
``{a:X}`` has the indefinite article before it.

Verse patterns have ten syllables a line. The number in a symbol's name counts syllables: ``N1`` is
a noun of one, ``A2`` an adjective of two with the stress on the first, ``C6`` a clause of six.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Role(NamedTuple):
    """A person of the play.

    Attributes:
        name: Given name, as others say it.
        title: What precedes the name when somebody of lower rank says it; may be empty.
        rank: 3 royal, 2 noble, 1 gentle, 0 common.
        sex: ``"m"`` or ``"f"``.
        humour: Temperament, a key of `HUMOURS`.
    """

    name: str
    title: str
    rank: int
    sex: str
    humour: str


def _roles(text: str) -> tuple[Role, ...]:
    """Read persons written as ``name/title/rank/sex/humour``, with ``-`` for no title."""
    rows = (entry.split("/") for entry in text.split())
    return tuple(Role(n, "" if t == "-" else t, int(r), s, h) for n, t, r, s, h in rows)


CAST: Final = _roles("""
    Aldemar/King/3/m/grave     Ysmene/Queen/3/f/courteous   Lorcan/Prince/3/m/bold
    Odile/Princess/3/f/sad     Corvane/Duke/2/m/bitter      Marabel/Duchess/2/f/courteous
    Haverel/Lord/2/m/grave     Sabine/Lady/2/f/bold         Tancred/Lord/2/m/bold
    Berengar/Count/2/m/sad     Elowen/Lady/2/f/courteous    Ambry/Bishop/2/m/grave
    Brandel/Captain/1/m/bold   Quillon/Doctor/1/m/grave     Rosamel/Mistress/1/f/courteous
    Fenwick/Master/1/m/bitter  Idony/Mistress/1/f/sad       Orsel/Master/1/m/courteous
    Lisk/Master/1/m/sad        Garrow/Captain/1/m/bitter    Bodkin/-/0/m/comic
    Tibb/-/0/f/comic           Pottle/-/0/m/comic           Madge/-/0/f/comic
    Crabtree/-/0/m/comic       Hester/-/0/f/grave           Pike/-/0/m/bitter
    Wattle/-/0/m/comic
""")

ADDRESS: Final = {
    "up 3 m": "2 my liege | 2 your grace | dread lord | great sir",
    "up 3 f": "2 madam | 2 your grace | bright dame",
    "up 2 m": "3 my lord | good lord | kind lord",
    "up 2 f": "2 madam | lady | fair dame",
    "up 1 m": "2 good sir | kind sir | master",
    "up 1 f": "2 mistress | good dame | sweet friend",
    "up 0 m": "neighbour | old friend | brother | gossip",
    "up 0 f": "neighbour | goodwife | sister | gossip",
    "down 2 m": "my lord | cousin | good lord",
    "down 2 f": "lady | cousin | sweet dame",
    "down 1 m": "good sir | my friend | young sir",
    "down 1 f": "my girl | mistress | good maid",
    "down 0 m": "2 sirrah | fellow | rascal | my man",
    "down 0 f": "2 woman | mistress | my wench | good soul",
    "alone": "poor heart | sad world | dull brain | fond soul | lone thought | vain tongue",
}
"""How a person is called: by somebody of lower or equal rank (up), of higher rank (down), or, by a
person who is alone, the person's own self."""

THOU: Final = {
    "thou": "thou", "thee": "thee", "thy": "thy", "art": "art", "hast": "hast", "dost": "dost",
    "wert": "wert", "thine": "thine", "speak": "speak'st", "know": "know'st", "self": "thyself",
    "TAUX": "wilt | shalt | canst | dost | mayst | must | wouldst | shouldst | couldst",
    "D": "5 the | 5 my | 4 thy | 3 this | 3 that | 2 our | his | her | yon | some",
}  # fmt: skip
YOU: Final = {
    "thou": "you", "thee": "you", "thy": "your", "art": "are", "hast": "have", "dost": "do",
    "wert": "were", "thine": "yours", "speak": "speak", "know": "know", "self": "yourself",
    "TAUX": "will | shall | can | do | may | must | would | should | could",
    "D": "5 the | 5 my | 4 your | 3 this | 3 that | 2 our | his | her | yon | some",
}  # fmt: skip


class Field(NamedTuple):
    """What a scene is about: where it may be set, and the nouns that are frequent in it."""

    places: str
    n1: str
    n2: str


FIELDS: Final = {
    "war": Field(
        "camp before the walls | breach in the wall | captain's tent | plain strewn with arms",
        "sword blade shield drum siege wound spear field flag lance helm breach steel truce spur",
        "banner trumpet armour battle soldier arrow rampart dagger conquest cannon horseman onset",
    ),
    "love": Field(
        "lady's chamber | bower of roses | balcony above the lake | walk between tall hedges",
        "heart kiss vow ring glove sigh blush rose bride charm dart flame sweet lip cheek",
        "lover passion beauty favour sweetheart longing wooing rapture dimple ribbon token wedding",
    ),
    "court": Field(
        "throne room | long gallery in the palace | council chamber | stair behind the throne",
        "crown throne robe realm seal court rank suit prince page mace train lord rule sway",
        "sceptre council courtier palace pageant kingdom homage ruler subject herald canopy baron",
    ),
    "sea": Field(
        "ship's deck in foul weather | harbour at low tide | rocky shore | cabin under the stern",
        "ship wave tide storm sail mast rock shore wind port deck foam pearl gulf keel",
        "tempest anchor harbour rudder mermaid sailor vessel pilot compass island ocean current",
    ),
    "death": Field(
        "churchyard in the rain | vault of the old kings | sick-room, curtained | field of graves",
        "grave tomb ghost shroud bell worm skull dust pall bier wreath knell corpse urn clay",
        "coffin spirit sexton mourner spectre poison charnel ember requiem sickness cypress raven",
    ),
    "gold": Field(
        "counting-house | merchant's shop | market square | cellar with iron chests",
        "gold purse coin debt bond price wealth chest pledge loan scale vault sum fee trade",
        "silver money treasure ransom merchant bargain jewel market payment profit ledger ruby",
    ),
    "faith": Field(
        "chapel at first light | cloister | hermit's cell | side altar, with one candle",
        "prayer psalm saint church oath sin soul cross hymn priest shrine creed grace monk cowl",
        "altar chapel angel heaven pilgrim temple penance blessing candle sermon relic mercy",
    ),
    "night": Field(
        "tower under the stars | bedchamber at midnight | dark lane | watch-fire on the wall",
        "night star moon dream sleep shade mist owl lamp dusk dew gloom bat couch spell",
        "shadow slumber midnight lantern evening twilight darkness vision planet curfew pillow bat",
    ),
    "garden": Field(
        "walled garden | orchard in blossom | meadow by the mill | maze of yew",
        "root seed thorn branch fruit bud vine spring weed bee grass oak plum hedge bough",
        "garden blossom summer winter orchard lily ivy meadow petal harvest acorn cedar",
    ),
    "hunt": Field(
        "forest clearing | kennel yard | lodge among the pines | stream in the deep wood",
        "hawk hound hart horn snare bow wood track lair stag fox wolf doe glade scent",
        "hunter falcon forest quarry thicket huntsman kennel bridle stallion spaniel covert talon",
    ),
    "law": Field(
        "court of law | prison | justice's parlour | scaffold at dawn",
        "law judge cause plea writ proof rope chain cell rack doom theft guilt thief block",
        "justice verdict prison witness gallows hangman treason statute sentence pardon warrant",
    ),
    "music": Field(
        "music room | minstrels' gallery | hall made ready for a masque | street below a window",
        "song lute harp string tune voice verse rhyme note pipe dance chord reed mask ear",
        "music fiddle measure singer cadence ballad chorus echo viol minstrel silence descant",
    ),
    "road": Field(
        "high road | inn at the crossing | bridge in the hills | gate of a strange city",
        "road horse inn mile bridge gate path staff cloak map stone hill pass shoe wheel",
        "journey stranger valley saddle river highway footstep mountain threshold exile wagon ford",
    ),
}  # fmt: skip

RHYMES: Final = (
    "night light sight might knight flight spite plight", "day way clay prey fray bay spray ray",
    "breath death", "woe foe snow crow blow flow glow show", "pain chain rain brain stain gain reign",
    "fire lyre pyre choir spire mire briar squire", "tear fear spear year ear cheer bier sphere",
    "heart dart art part smart chart", "stone throne bone groan moan drone", "sky eye lie sigh cry",
    "hand land sand band strand brand", "fate gate state hate weight date", "dove love glove",
    "gold cold fold hold mould", "deep sleep steep keep sheep", "grave wave knave slave cave",
    "crown gown town clown frown", "tide pride bride side guide", "bed head bread thread dread",
    "breast nest crest guest rest quest jest", "tree sea knee plea fee bee", "doom tomb gloom room",
    "flame shame name blame fame game", "song wrong throng tongue", "hour flower tower power",
    "air care despair prayer snare lair", "rose foes", "wind mind", "spring king ring string wing",
    "bell knell spell shell well", "moon tune noon boon", "face grace place race lace space",
)  # fmt: skip

VERBS: Final = """
    bind binds bound/break breaks broke/burn burns burned/mock mocks mocked/drown drowns drowned/
    kill kills killed/wake wakes waked/hold holds held/keep keeps kept/seek seeks sought/
    find finds found/fear fears feared/scorn scorns scorned/shun shuns shunned/stain stains stained/
    stab stabs stabbed/strike strikes struck/sting stings stung/tear tears torn/wear wears worn/
    win wins won/wring wrings wrung/slay slays slain/serve serves served/spurn spurns spurned/
    starve starves starved/tame tames tamed/teach teaches taught/wrong wrongs wronged/
    shake shakes shook/sell sells sold/shame shames shamed/rob robs robbed/rule rules ruled/
    save saves saved/scar scars scarred/quell quells quelled/pluck plucks plucked/mar mars marred/
    leave leaves left/know knows known/hear hears heard/heal heals healed/fill fills filled/
    feel feels felt/feed feeds fed/drink drinks drunk/draw draws drawn/damn damns damned/
    cool cools cooled/cure cures cured/claim claims claimed/charm charms charmed/buy buys bought/
    build builds built/bring brings brought/blame blames blamed/bear bears borne/bar bars barred/
    arm arms armed/lock locks locked/prove proves proved/warm warms warmed/sow sows sown/
    hide hides hid/hang hangs hung/lend lends lent/weigh weighs weighed/curb curbs curbed
"""

WORDS: Final = {
    "N1": """hope fear grief joy pride wrath hand eye tongue blood tear time day hour year world
        truth lie word name fame fate hate shame rage trust doubt care pain youth age mind breath
        face brow breast fire cup key knife glass wheel jest fool child chance luck sun rain cloud""",
    "N2": """sorrow fortune pleasure honour danger reason virtue malice fancy folly envy duty anger
        glory nature promise secret rumour comfort torment wisdom courage friendship counsel
        purpose moment season hatred ruin mirror serpent tyrant beggar mother father daughter""",
    "A1": """cold dark pale sweet false true bright blind dead deep dull dumb fair fierce frail free
        glad grim harsh high lame late lean lone loud low mad meek mild new old poor proud pure
        quick rash rich rough rude sad sharp sick slow soft sour stern strange strong swift tame
        thin vain warm weak wild wise young""",
    "A2": """hidden stolen nameless empty narrow sudden common foreign little barren naked endless
        double perfect distant other lesser buried borrowed painted sleeping ripened shaken""",
    "I1": """fall fade sleep weep bleed bloom sink groan moan rot rust shine sing sigh smile soar
        stand stir stray sway swell thrive toil turn wane wait walk yearn ache beg creep crawl cry
        drift droop fail feast flow gleam glow grow kneel leap live lurk mourn pray speak yield
        stoop reel roam""",
    "ADV2": """softly sadly slowly proudly swiftly boldly coldly darkly dimly fondly gladly gravely
        idly kindly lightly meekly nobly often seldom singly strangely sweetly truly vainly wildly
        wisely ever never surely""",
    "AUX": "2 doth | 2 shall | 2 must | 2 will | may | can | did | would | could | should | might",
    "MOD": "shall | must | will | may | can | would | could | should | might",
    "IAUX": "2 will | 2 shall | must | may | can | would | could | do | did",
    "CONJ": "3 When | 2 While | 2 Where | 2 Though | 2 Since | 2 If | Till | 2 As | Ere | For",
    "LINK": "3 And | 2 But | 2 Yet | For | So",
    "BEAST": """goose pig mule hen duck donkey badger hedgehog weasel ferret magpie lobster herring
        mackerel otter calf ram goat heifer mongrel kitten rabbit polecat sparrow gander turkey
        toad newt eel oyster snail beetle hornet maggot""",
    "HERD": """geese pigs mules hens ducks eels snails onions candles turnips buttons kettles
        pancakes herrings radishes thimbles whistles sausages nutshells acorns""",
    "JOB": """cobbler tinker tailor baker butcher barber brewer miller cooper fiddler sexton cook
        tapster hangman beadle notary carter thatcher weaver ostler pedlar chandler constable
        gravedigger alderman usher apothecary schoolmaster juggler widow midwife bellman""",
    "PART": """faced headed eared nosed bellied footed witted jawed kneed whiskered snouted
        toothed fisted shouldered bottomed gutted""",
    "INSULT": """dumpling lubber bodger puddle cabbage pumpkin noodle candle-end dishclout gaper
        thimble turnip blockhead bagpipe scarecrow pickle muffin doorknob ninny gabbler bungler
        mudlark snuffler grumbler doughball flapjack cheeseparing""",
    "BOX": """barrel bucket barn cupboard chimney ditch kettle basket saddlebag haystack pulpit
        cradle wheelbarrow well cellar belfry henhouse stewpot drawer apron oven hatbox trough""",
    "KIN": """aunt uncle grandam cousin godfather nephew niece stepmother brother-in-law landlady
        sister nurse bridegroom stepson grandsire tutor""",
    "FOOD": """mutton cabbage porridge bacon pudding mustard cheese tripe gingerbread turnip barley
        custard sausage dumpling venison pancake pottage parsnip crab marrow ham""",
    "SAUCE": """cold boiled stale roasted buttered pickled burnt salted mouldy peppered smoked
        sugared stewed borrowed yesterday's""",
    "GARB": """hat breeches shirt doublet nightcap apron boots stockings beard wig garters petticoat
        spectacles slippers buckle""",
    "NUM": "two three four five six seven eight nine ten eleven twelve forty fifty",
    "AIL": """the gout | the toothache | a surfeit of cherries | a cold in the knees | the hiccups
        | thinking | the east wind | a wet stocking | good advice | a long sermon | the bagpipes
        | an honest day's work | too much soap | a falling ladder""",
}


class Humour(NamedTuple):
    """A temperament: its own adjectives of two syllables, its oaths of two, its own sentences."""

    a2: str
    oaths: str
    lines: str


HUMOURS: Final = {
    "courteous": Humour(
        "gentle gracious noble tender honest courtly lovely pleasant golden faithful modest loyal",
        "I pray | in sooth | fair faith | with leave",
        """I thank {thee} for {D} {A2} {N1}, {VOC}{MORE} | My {A2} {N1} is {thine}, my {N2} too{MORE}
        | I kiss the {N1} that {V1s} {thy} {A2} {N1}{MORE}
        | Let me but {V1} {thy} {A2} {N1}, {VOC}{MORE}""",
    ),
    "bitter": Humour(
        "bitter rotten poisoned hollow wretched crooked cankered hateful spiteful wicked ragged",
        "hell's teeth | by spite | a plague | by bile",
        """I spit upon {D} {A2} {N1} of {N1}{MORE} | A pox on {N1}! {D} {A2} {N1} is {VP}{MORE}
        | I trust no {N1}, nor {A2} {N1}, nor {N2}{MORE}
        | Go, {V1} {thy} {N1}; I {V1} {D} {A2} {N1}{MORE}""",
    ),
    "bold": Humour(
        "iron bloody mighty flaming daring ruthless savage burning headlong hardy martial fearless",
        "by Mars | by steel | by blood | by fire",
        """Up, {N1}! up, {N1}! and {V1} {D} {A2} {N1}{MORE} | I'll {V1} {D} {N1}, or {I1}, or {V1} {D} {N2}{MORE}
        | My {N1} is drawn: what {N2} {V1s} me now? | Give me {D} {N1}, and I {IAUX} {V1} {D} {N2}{MORE}""",
    ),
    "sad": Humour(
        "weary silent lonely fading mournful drooping pallid ashen wasted broken tearful ghostly",
        "alas | ay me | by grief | by tears",
        """I have no {N1} but {A2} {N1} and {N2}{MORE} | All {N1} is {N1}, and every {N2} {I1s}{MORE}
        | My {N2} {I1s}, my {N1} is {A1} and {A1}{MORE} | Weep, {A2} {N1}, for {D} {A2} {N1} is {VP}{MORE}""",
    ),
    "grave": Humour(
        "solemn ancient prudent sober lawful righteous patient humble mortal mindful learned holy",
        "by heaven | by truth | mark this | be sure",
        """He that {AUX} {V1} {D} {N1} {AUX} {V1} {D} {N2}{MORE} | No {N1} so {A1} but {A2} {N1} {AUX} {V1} it{MORE}
        | The {A1} man {V1s} his {N1}, the fool his {N2}{MORE} | One {A2} {N1} is worth an age of {N2}{MORE}""",
    ),
    "comic": Humour(
        "greasy tipsy lousy crusty pickled buttered muddy wooden toothless spotted leaky rusty dusty",
        "by my boots | by Saint Onion | body o' me | as I am a sinner | by the pump",
        "{PS}",
    ),
}  # fmt: skip

VERSE: Final = {
    "S": """7 {P4} {C6}{MORE} | 4 {K4} {T6}{MORE} | 3 {K4}, {U6}{MORE} | 3 {Z10}{MORE} | 3 {Q10}
        | 4 {OWN} | {Z20}{END} | {A20}""",
    "END": "5 . | !",
    "MORE": """7 {END} | 6 ,/{CONJ} {C9}{END} | 3 ,/{LINK} {C9}{END} | 2 ;/{^D} {N1} of {N1} {AUX} {V1}
        {D} {A2} {N1}{END} | 2 ,/{CONJ} {C9},/{LINK} {C9}{END} | 2 :/{K4}, {U6}{END}""",
    "P4": """In sooth, {VOC}, | {^VOC}, I swear, | I say, {VOC}, | {^OATH}, {VOC}, | {^OATH}, and yet
        | Before the {N1}, | Beneath {D} {N1}, | Beyond {D} {N1}, | Without {D} {N1}, | For all {D} {N1},
        | 2 By {D} {A1} {N1}, | In {D} {A1} {N1}, | With {D} {A1} {N1}, | O {A2} {N1}, | By day and night,
        | 2 When {D} {N1} {I1s}, | While {D} {N1} {I1s}, | 2 If {D} {N1} {I1}, | Since {D} {N1} {I1s},
        | From {N1} to {N1}, | Come {N1}, come {N1}, | And yet, methinks, | I tell {thee} plain,
        | In time to come, | More {A1} than {N1}, | As I do {I1}, | So {I1s} {D} {N1}: | Though {N2} {I1},
        | {^thou} {know} full well, | Think on {D} {N1}: | Now, by {D} {N1},""",
    "C6": """2 {D} {A2} {N1} {AUX} {I1} | 2 {D} {N1} {AUX} {V1} {D} {N1} | 2 {D} {N2} {V1s} {D} {N1}
        | 2 {D} {N1} hath {VP} {D} {N1} | 2 I {IAUX} {V1} {D} {A1} {N1} | I {V1} {D} {N1} of {N1}
        | 2 {thou} {TAUX} {V1} {D} {A1} {N1} | {thou} {hast} {VP} {D} {A1} {N1} | we {V1} {D} {N1} and {I1}
        | {D} {N1} grows {A1} and {A1} | {D} {N2} is but {N1} | there is no {N1} but {I1s}
        | let {N2} {V1} {D} {N1} | {thy} {A2} {N1} is {VP} | {D} {N1} of {N2} {I1s}
        | who {V1s} {D} {N1} must {I1} | 'tis {N2} {V1s} {D} {N1} | my {N1} and {N2} {I1}
        | {D} {N1} will not be {VP} | {D} {N1} was never {VP} | so {I1s} {D} {A2} {N1}
        | {ADV2} {D} {N2} {I1s} | {D} {THEME} is {A1} as {N1} | {thou} {T1} {D} {A2} {N1}
        | I {ADV2} {V1} {D} {N1} | I am {D} {N1} of {N1} | no {N1} {AUX} {V1} {D} {N1}""",
    "C9": """2 {D} {A1} {N1} {AUX} {V1} {D} {A2} {N1} | {D} {A2} {N1} {V1s} {D} {A2} {N1}
        | {D} {N1} of {N2} {V1s} {D} {A1} {N1} | {D} {N2} and {D} {N2} {MOD} {I1}
        | I {IAUX} {V1} {D} {A2} {N1} and {I1} | {thou} {TAUX} {V1} {D} {N1} and {D} {N2}
        | {D} {N2} {I1s} and {D} {A1} {N1} {I1s} | no {A2} {N1} {AUX} {V1} {D} {A1} {N1}
        | {ADV2} {I1s} {D} {N1} of {A2} {N1} | {D} {N1} is {VP} and {D} {A2} {N1} {I1s}
        | I have not {VP} {D} {A2} {N1} of {N1} | {D} {A2} {THEME} {AUX} {V1} {D} {N1} and {I1}""",
    "K4": """2 I {V1} {D} {N1} | 2 {^D} {N1} {AUX} {I1} | 2 {^D} {N2} {I1s} | {^thou} {TAUX} not {I1}
        | {^D} {N1} is {A1} | {^D} {N1} is {VP} | My {N1} is {thine} | I {IAUX} not {I1} | Let {N2} {I1}
        | Give me {D} {N1} | I am no {N1} | I dream of {N1} | So {I1s} {D} {N1} | There {I1s} {D} {N1}
        | Forget {D} {N1} | {^V1} {D} {A1} {N1} | {^I1}, {A2} {N1} | We must not {I1} | {^thou} {T1} {D} {N1}
        | {^ADV2} I {I1} | {^N1} is not {N1} | Hast {N1} no {N1}""".replace("| Hast {N1} no {N1}", ""),
    "T6": """2 when {D} {A2} {N1} {I1s} | as {D} {N1} {V1s} {D} {N1} | like {D} {A1} {N1} of {N1}
        | beneath {D} {A2} {N1} | upon {D} {N1} of {N1} | in {D} {A2} {N2} | for {N2} and for {N1}
        | till {N2} {V1s} {D} {N1} | where {N1} and {N2} {I1} | without {D} {N1} of {N1}
        | before {D} {A2} {N1} | with {N2} in {D} {N1} | while {D} {N2} {AUX} {I1}""",
    "U6": """2 and {D} {A2} {N1} {I1s} | 2 but {D} {N2} {AUX} {I1} | 2 for {D} {N1} {V1s} {D} {N1}
        | though {D} {N1} {AUX} {V1} {N1} | {VOC}, with {D} {A1} {N1} | {VOC}, and {D} {N1} {I1s}
        | nor shall {D} {A2} {N1} | yet {D} {A2} {N1} is {VP}
        | and I {IAUX} {V1} {D} {N1} | {VOC}: {D} {N1} is {A1}""".replace("""
        | nor shall {D} {A2} {N1} |""", "\n        |"),
    "Z10": """{^D} {A2} {N1} {AUX} {V1} {D} {A2} {N1} | Nor {N1} nor {N1} {AUX} {V1} {D} {A2} {N1}
        | Between {D} {N1} and {D} {A2} {N1} I {I1} | {^N1} {V1s} {D} {N1}, and {N2} {V1s} {D} {N1}
        | I have {VP} {N1}, and {VP} {D} {A2} {N2} | They say {ABSENT} hath {VP} {HIS} {N1}
        | {^ABSENT} {AUX} {V1} {D} {A2} {N1} | Had I {thy} {N1}, I would {V1} {D} {A2} {N1}
        | More {N1}, less {N1}; more {A2} {N1}, less {N2}""",
    "Z20": """I saw {D} {A2} {N1} of {A2} {N1}/Whose {N2} {V1s} {D} {A1} {N1} of {N1}
        | As {A1} as {N1} that {V1s} {D} {A2} {N1},/So {A1} {AUX} be {D} {N2} of {D} {N1}
        | Once was {D} {N1} the {N2} of {D} {N1};/And now {D} {A2} {N1} {AUX} {V1} {D} {N2}
        | If {A2} {N1} {AUX} {V1} {D} {N1} of {N2},/Then let {D} {N1} be {A1} and {N2} {I1}""",
    "A20": """Where is {ABSENT}? {^HE} {AUX} {V1} {D} {A1} {N1},/And {HIS} {A2} {N1} {AUX} {V1} {D} {N2}{END}
        | I had a letter late from {ABSENT}:/{^HE} {V1s} {HIS} {N1}, and {AUX} {V1} {D} {A2} {N1}{END}""",
    "Q10": """What {N1} is this that {V1s} {D} {A2} {N1}? | Who {V1s} {D} {N1} when {D} {A2} {N1} {I1s}?
        | Shall {D} {N1} {V1} {D} {A2} {N1} of {N1}? | Why {dost} {thou} {V1} {D} {N1} of {A2} {N1}?
        | Where is {D} {N1} that {AUX} {V1} {D} {N2}? | Is there no {N1} to {V1} {D} {A2} {N1}?
        | What is {D} {N1} but {N2} in {D} {N1}? | How {AUX} {D} {A2} {N1} {I1}, and {D} {N1} {I1}?
        | {^hast} {thou} not {VP} {D} {A2} {N1}, {VOC}? | What, must {D} {N2} {V1} {D} {N1} of {N1}?
        | {^art} {thou} so {A1}, so {A2}, and so {A1}?""",
    "ECHOED": """2 This {ECHO}, {VOC}, {C6}{MORE} | That {ECHO}, {VOC}, {C6}{MORE} | By that same {ECHO}, {C6}{MORE}
        | Call it not {ECHO}: {C6}{MORE} | If {thy} {ECHO} {I1}, {C6}{MORE} | {^thy} {ECHO}, {VOC}, {AUX} {V1}
        {D} {A2} {N1}{MORE} | What {ECHO}, {VOC}? {^D} {A2} {N1} {AUX} {I1}{END}
        | {^thou} {speak} of {ECHO}, {VOC}, and {D} {N1} {I1s}{MORE} | Is it {thy} {ECHO} that {V1s} {D} {A2} {N1}?
        | What hath {thy} {ECHO} to do with {A2} {N1}?""",
    "SHORT": """I {IAUX}, {VOC}; {C6}{END} | Not so, {VOC}: {C6}{END} | Ay, by {D} {N1}; {C6}{END}
        | Peace, {VOC}, peace: {C6}{END} | No, {VOC}: {C6}{END} | {^OATH}, I {IAUX} {V1} {thy} {A2} {N1}{END}
        | {^OATH}, {VOC}! {Q10} | So be it: {C6}{END}""",
    "BODY": "4 {S} | 5 {S}/{S} | 3 {S}/{S}/{S} | {S}/{S}/{S}/{S} | {S}/{S}/{S}/{S}/{S}",
    "verse open": """{NAMED}, what news of {D} {A2} {THEME}?/{BODY} | {NAMED}, {D} {THEME} hath {VP}
        {D} {A2} {N1}{MORE}/{BODY} | Speak, {NAMED}: who hath {VP} {D} {A2} {THEME}?/{BODY}
        | {^thou} {know}, {NAMED}, {D} {A2} {THEME} is {VP}{MORE}/{BODY}""",
    "verse turn": """Hear me, {NAMED}: {C6}{MORE} | Hear me, {NAMED}: {C6}{MORE}/{BODY} | And {thou},
        {NAMED}? {Q10} | {NAMED}, {C6}{MORE}/{BODY} | Come, {NAMED}, {V1} {D} {A2} {N1}{MORE}
        | What say {thou}""".replace("\n        | What say {thou}", ""),
    "verse reply": "5 {ECHOED} | 6 {ECHOED}/{BODY} | 3 {SHORT} | 3 {SHORT}/{BODY} | 4 {BODY}",
    "verse alone": """O {A2} {THEME}, {D} {N1} {AUX} {V1} {thee}{MORE}/{BODY} | Now {I1s} {D} {N1}, and now
        {D} {A2} {THEME}{MORE}/{BODY} | What is {D} {THEME}? {^D} {A2} {N1} of {N1}{MORE}/{BODY}
        | I am {VP}: {D} {THEME} {V1s} {D} {A2} {N1}{MORE}/{BODY} | {Q10}/{BODY}""",
    "aside": "{C6up}{MORE} | {OWN} | {Q10} | {P4} {C6}{END}".replace("{C6up}{MORE} | ", ""),
    "verse leave": """Farewell, {VOC}: {C6}{MORE} | I take my leave: {C6}{MORE} | {BODY}/I go to {V1} {D}
        {A2} {N1}, {VOC}. | No more; I go to {V1} {D} {A2} {N1}{END} | {^VOC}, farewell: {C6}{MORE}""",
    "verse announce": """{BODY}/But see, here comes {NEW}, {A1} as {N1}. | {BODY}/Look where {NEW} doth come with
        {A2} {N1}. | {ECHOED}/Here {I1s} {NEW}: let {N2} be our {N1}. | {SHORT}/Soft, {NEW} comes;
        {D} {A2} {N1} {AUX} {I1}.""",
    "COUPLET": """{D1} {A2} {N1} {AUX} {V1} {D} {A2} {RH1},/{LINK} {D} {A1} {N1} {AUX} {V1} {D} {A2} {RH2}.
        | Then {V1} {D} {A2} {N1}, and {V1} {D} {RH1};/{LINK} let {D} {N2} {V1} {D} {A2} {RH2}.
        | I'll {V1} {D} {N1}, and {I1} beneath {D} {RH1},/Till {A2} {N1} {AUX} {V1} {D} {A1} {RH2}.
        | So {D} {A2} {N1} {V1s} {D} {A2} {RH1},/{LINK} {thou} {TAUX} {V1} {D} {A1} {N1} and {RH2}.
        | When {N2} {I1s}, and {N2} {V1s} {D} {RH1},/No {N1} {AUX} {V1} {D} {A2} {N1} of {RH2}.
        | Let {A2} {N1} be {VP} with {D} {RH1}:/{^D} {N1} of {N2} {AUX} be our {RH2}.""".replace(
        "{D1}", "{^D}"
    ),
    "verse end": "2 {BODY}/{COUPLET} | 2 {COUPLET} | {SHORT}/{COUPLET}",
}  # fmt: skip

PROSE: Final = {
    "PS": """As {A1} as {a:BEAST} in {a:BOX}, {^OATH}{END} | My {KIN} was {a:JOB}, and died of {AIL}{END}
        | I had rather {DO} than {DO}{END} | He that would {DO} must first {DO}{END}
        | {^D} {N1} is like {a:BEAST} in {a:BOX}: it {I1s} and it {I1s}, and {V1s} {a:JOB}{END}
        | I knew {a:JOB} once that could {DO}, and {he} was never {VP} for it{END}
        | {NUMup} {HERD} and {a:BOX} of {FOOD}{END} | Give me {SAUCE} {FOOD} and {a:BOX} to {I1} in, and let
        {thy} {N2} {I1}{END} | {^thou} {TAUX} {DO}, {VOC}, and yet {TAUX2}""",
}
