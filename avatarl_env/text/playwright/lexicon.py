"""Characters and words of the embedded play, written for this package.

The rules have the format of `avatarl_env.text.playwright.grammar`. The digit of a symbol counts
syllables: `N1` is a noun of one, `A2` an adjective of two with the stress on the first.
"""

from __future__ import annotations

from typing import Final

CAST: Final = """
Aldemar/King/3/m/grave     Ysmene/Queen/3/f/courteous   Lorcan/Prince/3/m/bold
Odile/Princess/3/f/sad     Corvane/Duke/2/m/bitter      Marabel/Duchess/2/f/courteous
Haverel/Lord/2/m/grave     Sabine/Lady/2/f/bold         Tancred/Lord/2/m/bold
Berengar/Count/2/m/sad     Elowen/Lady/2/f/courteous    Ambry/Bishop/2/m/grave
Brandel/Captain/1/m/bold   Quillon/Doctor/1/m/grave     Rosamel/Mistress/1/f/courteous
Fenwick/Master/1/m/bitter  Idony/Mistress/1/f/sad       Orsel/Master/1/m/courteous
Lisk/Master/1/m/sad        Garrow/Captain/1/m/bitter    Bodkin/-/0/m/comic
Tibb/-/0/f/comic           Pottle/-/0/m/comic           Madge/-/0/f/bold
Crabtree/-/0/m/comic       Hester/-/0/f/grave           Pike/-/0/m/bitter
Wattle/-/0/m/sad
"""
"""Name, title (used by lower ranks), rank (3 royal, 2 noble, 1 gentle, 0 common), sex and humour of
each character."""

PRONOUNS: Final = """
thou/you thee/you thy/your thine/yours art/are hast/have dost/do know'st/know speak'st/speak
look'st/look
"""
"""The familiar and the formal word of a symbol, which is named after the familiar one."""

ADDRESS: Final = """
up3m VOC = 2 my liege | 2 your grace | dread lord | great sir | high lord
up3f VOC = 2 madam | 2 your grace | bright dame | great dame
up2m VOC = 3 my lord | good lord | kind lord | dear lord | wise lord
up2f VOC = 2 madam | lady | fair dame | dear dame
up1m VOC = 2 good sir | kind sir | master | brave sir | dear sir
up1f VOC = 2 mistress | good dame | sweet friend | kind heart
up0m VOC = neighbour | old friend | brother | gossip | good man
up0f VOC = neighbour | goodwife | sister | gossip
down2m VOC = my lord | cousin | good lord | brave lord | old friend
down2f VOC = lady | cousin | sweet dame | dear friend
down1m VOC = good sir | my friend | young sir | good man
down1f VOC = dear girl | mistress | good maid | sweet child
down0m VOC = 2 sirrah | fellow | rascal | my man | thou knave | good man
down0f VOC = 2 woman | mistress | my wench | good soul | old girl
self VOC = poor heart | sad world | dull brain | fond soul | lone thought | vain tongue | false hope
  | blind hand | old fool
thou TAUX = wilt | shalt | canst | dost | mayst | must | wouldst | shouldst | couldst
you TAUX = will | shall | can | do | may | must | would | should | could
thou D = 3 the | 3 my | 3 thy | 2 this | 2 that | 2 our | 2 his | 2 her | 2 their | yon | some
you D = 3 the | 3 my | 3 your | 2 this | 2 that | 2 our | 2 his | 2 her | 2 their | yon | some
"""
"""Forms of address used by a lower or equal rank (up) or a higher one (down), by rank and sex; what
a character alone on stage addresses; and the words that go with `thou` and with `you`."""

FIELDS: Final = """
war PLACE = camp before the walls | breach in the wall | captain's tent | plain strewn with arms
war N1 = sword blade shield drum siege wound spear field flag lance helm breach steel truce spur
  bolt moat trench guard scout troop fort ram shot scar foe rout
war N2 = banner trumpet armour battle soldier arrow rampart dagger conquest cannon horseman onset
love PLACE = lady's chamber | bower of roses | balcony above the lake | walk between tall hedges
love N1 = heart kiss vow ring glove sigh blush rose bride charm dart flame sweet lip cheek lace curl
  pearl dove lure tryst pledge ache swoon gem
love N2 = lover passion beauty favour sweetheart longing wooing rapture dimple ribbon token wedding
court PLACE = throne room | long gallery in the palace | council chamber | stair behind the throne
court N1 = crown throne robe realm seal court rank suit prince page mace train lord rule sway cape
  fan stool badge chair ball mask earl knight peer squire plume
court N2 = sceptre council courtier palace pageant kingdom homage ruler subject herald footstool
  baron
sea PLACE = ship's deck in foul weather | harbour at low tide | rocky shore | cabin under the stern
sea N1 = ship wave tide storm sail mast rock shore wind port deck foam pearl gulf keel reef bay fish
  net oar brine salt gale hull whale gull crew
sea N2 = tempest anchor harbour rudder mermaid sailor vessel pilot lighthouse island ocean current
death PLACE = churchyard in the rain | vault of dead kings | dim sick-room | field of graves
death N1 = grave tomb ghost shroud bell worm skull dust pall bier wreath knell corpse urn clay ash
  crypt mould gloom wake dirge moth crow plague pit cross priest
death N2 = coffin spirit sexton mourner spectre poison charnel ember requiem sickness graveyard
  raven
gold PLACE = counting-house | merchant's shop | market square | cellar with iron chests
gold N1 = gold purse coin debt bond price wealth chest pledge loan scale vault sum fee trade till
  mint ring pearl bank rent tax cost toll loss gain stake
gold N2 = silver money treasure ransom merchant bargain jewel market payment profit ledger ruby
faith PLACE = chapel at first light | cloister | hermit's cell | side altar with one candle
faith N1 = prayer psalm saint church oath sin soul cross hymn priest shrine creed grace monk cowl
  bell book nun vow choir fast font tithe peace bliss palm sign
faith N2 = altar chapel angel heaven pilgrim temple penance blessing candle sermon relic mercy
night PLACE = tower under the stars | bedchamber at midnight | dark lane | watch-fire on the wall
night N1 = night star moon dream sleep shade mist owl lamp dusk dew gloom bat couch spell hush bed
  bell spark veil ghost sky flame haze cloud thief moth
night N2 = shadow slumber midnight lantern evening twilight darkness vision planet curfew pillow
garden PLACE = walled garden | orchard in blossom | meadow by the mill | maze of yew
garden N1 = root seed thorn branch fruit bud vine spring weed bee grass oak plum hedge bough leaf
  moss lawn lark pear peach fern stem hive soil spade nest
garden N2 = garden blossom summer winter orchard lily ivy meadow petal harvest acorn cedar
hunt PLACE = forest clearing | kennel yard | lodge among the pines | stream in the deep wood
hunt N1 = hawk hound hart horn snare bow wood track lair stag fox wolf doe glade scent hare bolt
  glove pack trail fang pelt leash crag fur spur tusk
hunt N2 = hunter falcon forest quarry thicket huntsman kennel bridle stallion spaniel covert talon
law PLACE = court of law | prison | justice's parlour | scaffold at dawn
law N1 = law judge cause plea writ proof rope chain cell rack doom theft guilt thief block oath jail
  crime fine clerk deed wig book fault fee guard right
law N2 = justice verdict prison witness dungeon hangman treason statute sentence pardon warrant
music PLACE = music room | minstrels' gallery | hall set for a masque | street below a window
music N1 = song lute harp string tune voice verse rhyme note pipe dance chord reed mask ear horn
  drum choir bell key air breath hand beat strain jig lay
music N2 = music fiddle measure singer cadence ballad trio echo viol minstrel silence descant
road PLACE = high road | inn at the crossing | bridge in the hills | gate of a strange city
road N1 = road horse inn mile bridge gate path staff cloak map stone hill pass shoe wheel cart ford
  coach whip pack dust moon boot toll cross wood hedge
road N2 = journey stranger valley saddle river highway footstep mountain threshold exile wagon
"""
"""What a scene is about: where it may be set, and the nouns that are frequent in it."""

HUMOURS: Final = """
courteous A2 = gentle gracious noble tender honest courtly lovely pleasant golden faithful modest
courteous OATH = I pray | in sooth | good faith | indeed | in truth | I vow
courteous OWN = I thank {thee} for {D} {NP}, {VOC}{MORE} | My {NP} is {thine}, my {N2} too{MORE} | I
  kiss the {N1} that {V1s} {thy} {NP}{MORE} | Let me but {V1} {thy} {NP}, {VOC}{MORE}
bitter A2 = bitter rotten poisoned hollow wretched crooked cankered hateful spiteful wicked ragged
bitter OATH = hell's teeth | by spite | a plague | by bile | by gall | fie, fie
bitter OWN = I spit upon {D} {NP} of {N1}{MORE} | A pox on {N1}! {^D} {NP} is {VP}{MORE} | I trust
  no {N1}, nor {NP}, nor {N2}{MORE} | Go, {V1} {thy} {N1}; I {V1} {D} {NP}{MORE}
bold A2 = iron bloody mighty flaming daring ruthless savage burning headlong hardy martial fearless
bold OATH = by Mars | by steel | by blood | by fire | by storm
bold OWN = Up, {N1}! up, {N1}! and {V1} {D} {NP}{MORE} | I'll {V1} {D} {N1}, or {I1}, or {V1} {D}
  {N2}{MORE} | My {N1} is drawn: what {N2} {V1s} me now? | Give me {D} {N1}, and I {IAUX} {V1} {D}
  {N2}{MORE}
sad A2 = weary silent lonely fading mournful drooping pallid ashen wasted broken tearful ghostly
sad OATH = alas | ay me | by grief | by tears | woe, woe | by night
sad OWN = I have no {N1} but {NP} and {N2}{MORE} | All {N1} is {N1}, and every {N2} {I1s}{MORE} | My
  {N2} {I1s}, my {N1} is {A1} and {A1}{MORE} | Weep, {NP}, for {D} {NP} is {VP}{MORE}
grave A2 = solemn ancient prudent sober lawful righteous patient humble mortal mindful learned holy
grave OATH = by heaven | by truth | be sure | in fine | by law | by age
grave OWN = He that {AUX} {V1} {D} {N1} {AUX} {V1} {D} {N2}{MORE} | No {N1} so {A1} but {NP} {AUX}
  {V1} it{MORE} | The {A1} man {V1s} his {N1}, the fool his {N2}{MORE} | One {NP} is worth an age of
  {N2}{MORE}
comic A2 = greasy tipsy lousy crusty pickled buttered muddy wooden toothless spotted leaky dusty
comic OATH = by my boots | by Saint Bun | body of me | by the pump | faith
comic OWN = {PS} | {PS}
"""
"""The temperaments: favourite adjectives, oaths, and sentences that nobody else says."""

WORDS: Final = """
N1 = hope fear grief joy pride wrath hand eye tongue blood tear time day hour year world truth lie
  word name fame fate hate shame rage trust doubt care pain youth age mind breath face brow breast
  fire knife glass jest fool child chance luck sun rain cloud bone skin throat wrist knee heel arm
  hair beard nail look glance smile frown step leap snow frost ice flood stream lake cliff cave peak
  dale moor marsh mud salt bread meat wine ale oil wool silk lace thread bed bowl pen scroll mark
  line sign skill craft art rest thirst greed spite scorn dread bliss mirth zeal lamb snake colt
  hive nest shell wing ash beam bill brand brook cage clasp clock club coal cord corn creek crumb
  curse dart ditch dirge fang fern fist fleece flint flute goat grain grape hail hawk hearth herb
  herd hoof hut ink lark leaf limb mace moss moth net noose pact peach pear plague plank plot pond
  pulse quill raft rib rust sap scar shore slate sleeve smoke snail soil soot spade spark spike
  stain stake steam stem straw street swan swarm torch twig veil well wheat whim whip wick wren yard
  yarn yoke
N2 = sorrow fortune pleasure honour danger reason virtue malice fancy folly envy duty anger glory
  nature promise secret rumour comfort torment wisdom courage friendship counsel purpose moment
  season hatred ruin mirror serpent tyrant beggar mother father daughter ardour candour terror
  horror error pity hunger thunder lightning feather marble leather velvet hammer furnace window
  curtain kitchen village tower garment mantle finger shoulder bosom forehead whisper murmur clamour
  laughter question answer riddle puzzle story chapter paper letter parchment power morning sunrise
  sunset neighbour master servant orphan giant monster dragon spider lion tiger eagle adder anchor
  apple arbour autumn badger beacon bramble burden candle castle cavern chamber chariot chasm cherry
  chimney circle city comet corner cottage cradle crystal desert eyelid falsehood fever fiddle
  flagon fountain freedom gateway goblet hamlet handle hazard heaven hollow infant jailer ladder
  lantern limit marvel meeting mischief monarch mountain nectar nettle pasture pebble pillar
  portrait powder presence proverb quarrel ransom record remnant ribbon scandal scholar shepherd
  shudder signal silence sinner slander splendour statue stumble tavern teacher thistle torrent
  traitor trifle tumult turmoil turret uncle valour vapour victim villain vintage vulture warning
  water wonder worship
A1 = cold dark pale sweet false true bright blind dead deep dull dumb fair fierce frail free glad
  grim harsh high lame late lean lone loud low mad meek mild new old poor proud pure quick rash rich
  rough rude sad sharp sick slow soft sour stern strange strong swift tame thin vain warm weak wild
  wise young bare bland blank blunt bold brave brief brisk brown calm cheap chill clean clear coarse
  cool crude curt damp dense dire drear dry faint fast fat fine firm flat foul full gray green hard
  hoarse hot huge just keen kind large lithe long mean moist mute pert plain prim prompt rare raw
  ripe round safe sane scant shy sleek slim sly small smooth snug sore spare stale stark steep stiff
  stout straight strict taut tense terse thick tight trim vast vile wan wet whole wide worn
A2 = hidden stolen nameless empty narrow sudden common foreign little barren naked endless double
  perfect distant lesser buried borrowed painted sleeping ripened shaken tangled twisted frozen
  melted winding crumbling trembling falling rising dancing singing creeping gaping staring waking
  growing fatal vital regal rural civil simple ample supple subtle brittle nimble mellow yellow
  purple crimson scarlet leaden brazen earthen woollen silken secret open early timely lively deadly
  ghastly stately costly homely lowly friendly cunning clever busy easy ready steady tardy lofty
  dusky stormy rainy windy sunny cloudy misty shady thorny stony bony downy hairy juicy lucky sickly
  useful fruitful graceful fretful restless reckless shameless careless lawless
I1 = fall fade sleep weep bleed bloom sink groan moan rot rust shine sing sigh smile soar stand stir
  stray sway swell thrive toil turn wane wait walk yearn ache beg creep crawl droop fail feast flow
  gleam glow grow kneel leap live lurk mourn pray speak yield stoop reel roam bow brood cling dive
  dwell ebb fawn float flare flit frown fume gape gasp grin grope growl howl laugh leer limp loom
  melt pant peer pine plod prowl quake ride roar rove sail scowl shrink slink smart smoke snarl
  sneer sob spring sprout steam stride strive sulk swerve swim swoon thaw throb twirl veer wail warp
  wheel wilt wink yawn
ADV2 = softly sadly slowly proudly swiftly boldly coldly darkly dimly fondly gladly gravely idly
  kindly lightly meekly nobly often seldom singly strangely sweetly truly vainly wildly wisely
  surely badly barely blindly bravely calmly closely deeply dearly dully duly fairly falsely
  fiercely firmly freely greatly grimly harshly hotly justly keenly largely lewdly loudly madly
  mildly mutely neatly newly oddly palely plainly poorly purely quickly rarely rashly roughly rudely
  safely sharply shyly slyly smoothly sorely sternly stoutly tamely thinly warmly weakly wholly
AUX = 2 doth | 2 shall | 2 must | 2 will | may | can | did | would | could | should | might
MOD = shall must will may can would could should might
IAUX = 2 will | 2 shall | must | may | can | would | could | do | did
CONJ = 3 When | 2 While | 2 Where | 2 Though | 2 Since | 2 If | Till | 2 As | Ere | 2 For
LINK = 3 And | 2 But | 2 Yet | For | So
END = 5 . | !
BEAST = goose pig mule hen duck donkey badger hedgehog weasel ferret magpie lobster herring mackerel
  otter calf ram goat heifer mongrel kitten rabbit polecat sparrow gander turkey toad newt eel
  oyster snail beetle hornet maggot flea gnat moth wasp frog mole rat shrew stoat crab carp trout
  shrimp crow rook jay daw wren ape bear boar cow ewe pup cub
HERD = geese pigs mules hens ducks eels snails onions candles turnips buttons kettles pancakes
  herrings radishes thimbles whistles sausages nutshells acorns plums pins eggs goats toads spoons
  bees kegs hats pears tarts fleas
JOB = cobbler tinker tailor baker butcher barber brewer miller cooper fiddler sexton cook tapster
  hangman beadle notary carter thatcher weaver ostler pedlar chandler constable gravedigger alderman
  usher apothecary schoolmaster juggler widower bellman monk friar clerk page squire groom cobbler
  smith tanner mason glover saddler potter dyer fuller bailiff poet jailer sailor
PART = faced headed eared nosed bellied footed witted jawed kneed whiskered snouted toothed fisted
  shouldered bottomed
INSULT = dumpling lubber bodger puddle pumpkin noodle candle-end dishclout gaper thimble blockhead
  bagpipe scarecrow pickle muffin doorknob ninny gabbler bungler mudlark snuffler grumbler doughball
  flapjack cheeseparing
BOX = barrel bucket barn cupboard chimney ditch kettle basket saddlebag haystack pulpit cradle
  wheelbarrow well cellar belfry henhouse stewpot drawer oven hatbox trough tub jug pot pan sack
  sieve crib sty pond bog attic drum chest cart wig boot
KIN = aunt uncle grandam cousin godfather nephew niece stepmother landlady sister nurse bridegroom
  stepson grandsire tutor brother father mother daughter son wife godson
FOOD = mutton cabbage porridge bacon pudding mustard cheese tripe gingerbread turnip barley custard
  sausage venison pancake pottage parsnip crab marrow ham pie soup eel tart stew beef pork veal
  broth toast jam curd whey leek bean onion garlic oatmeal honey
SAUCE = cold boiled stale roasted buttered pickled burnt salted mouldy peppered smoked sugared
  stewed borrowed raw fried minced baked soft hot sour green lukewarm mashed sliced
GARB = hat shirt doublet nightcap apron boot stocking beard wig petticoat slipper pocket buckle
  sleeve hose cap coat belt glove collar cloak shoe purse
NUM = two three four five six seven eight nine ten eleven twelve forty fifty
AIL = the gout | the toothache | a surfeit of cherries | a cold in the knees | the hiccups |
  thinking | the east wind | a wet stocking | good advice | a long sermon | too much soap | a
  falling ladder | the bagpipes | a day's work
BURDEN = lillabee tirralay dillydown rumbelow lullamay fallaroon pittapat windaway
"""

VERBS: Final = """
bind/bound break/broke burn/burned mock/mocked drown/drowned kill/killed wake/waked hold/held
keep/kept seek/sought find/found fear/feared scorn/scorned shun/shunned stain/stained stab/stabbed
strike/struck sting/stung tear/torn wear/worn win/won wring/wrung slay/slain serve/served
spurn/spurned starve/starved tame/tamed wrong/wronged shake/shook sell/sold
shame/shamed rob/robbed rule/ruled save/saved scar/scarred quell/quelled pluck/plucked mar/marred
leave/left know/known hear/heard heal/healed fill/filled feel/felt feed/fed drink/drunk draw/drawn
damn/damned cool/cooled cure/cured claim/claimed charm/charmed buy/bought build/built bring/brought
blame/blamed bear/borne bar/barred arm/armed lock/locked prove/proved warm/warmed sow/sown hide/hid
hang/hung lend/lent weigh/weighed curb/curbed ban/banned chain/chained chill/chilled
choke/choked clip/clipped cloak/cloaked coin/coined crave/craved daub/daubed deal/dealt dig/dug
dim/dimmed dip/dipped drag/dragged drain/drained dull/dulled dupe/duped earn/earned fan/fanned
flay/flayed fling/flung foil/foiled frame/framed gain/gained gnaw/gnawed grind/ground
grip/gripped harm/harmed haul/hauled heap/heaped help/helped hem/hemmed hire/hired hurl/hurled
join/joined kick/kicked knit/knit lame/lamed loathe/loathed lure/lured maim/maimed
make/made mark/marked meet/met nail/nailed name/named pare/pared pay/paid peel/peeled
pen/penned pick/picked pile/piled pin/pinned plough/ploughed pour/poured prick/pricked prop/propped
prune/pruned pull/pulled reap/reaped rend/rent rip/ripped rock/rocked roll/rolled scan/scanned
scare/scared scour/scoured scrape/scraped seal/sealed sear/seared sew/sewn shave/shaved shear/shorn
shed/shed shoot/shot show/shown sip/sipped slit/slit smooth/smoothed
snap/snapped soil/soiled span/spanned spare/spared spend/spent spill/spilled spin/spun split/split
spoil/spoiled stalk/stalked stem/stemmed stir/stirred stop/stopped strew/strewn
stuff/stuffed sweep/swept swing/swung tap/tapped
tell/told thank/thanked thaw/thawed throw/thrown tie/tied till/tilled track/tracked trap/trapped
trick/tricked trim/trimmed twine/twined view/viewed wed/wed whip/whipped wipe/wiped woo/wooed
wrap/wrapped yoke/yoked
"""
"""Verbs that take an object: base and past participle, of one syllable both."""

RHYMES: Final = """
night light sight might knight flight spite plight/day way clay prey fray bay spray ray/moon tune/
woe foe snow crow blow flow glow show/pain chain rain brain stain gain reign/tree sea knee plea/
fire lyre pyre choir spire mire briar squire/tear fear spear year ear cheer bier/breath death/
heart dart art part smart chart/stone throne bone groan moan drone/sky eye lie sigh cry/dove glove/
hand land sand band strand brand/fate gate state hate weight date/gold cold fold hold mould/
deep sleep steep keep sheep/grave wave knave slave cave/crown gown town clown frown/wind mind/
tide pride bride side guide/bed head bread thread dread/breast nest crest guest rest quest jest/
doom tomb gloom room/flame shame name blame fame game/song wrong throng/hour flower tower power/
air care despair prayer snare lair/spring king ring string wing/bell knell spell shell well/
face grace place race lace space
"""
"""Nouns that rhyme, class by class."""
