"""Sentences and speeches of the embedded play, written for this package.

The rules have the format of `avatarl_env.text.playwright.grammar`. Verse has ten syllables a line;
the digit of a symbol counts syllables, so `C6` is a clause of six. The words are in
`avatarl_env.text.playwright.lexicon`.
"""

from __future__ import annotations

from typing import Final

SENTENCES: Final = """
S = 7 {P4} {C6}{MORE} | 4 {K4} {T6}{MORE} | 3 {K4}, {U6}{MORE} | 4 {Z10}{MORE} | 3 {Q10} | 4 {OWN} |
  {Z20}{END} | {A20}
NP = 3 {A2} {N1} | 4 {A1} {N2} | {N2}'s {N1} | 3 {A1} {A1} {N1}
MORE = 7 {END} | 6 ,/{CONJ} {C9}{END} | 3 ,/{LINK} {C9}{END} | 2 ;/{^D} {N1} of {N1} {AUX} {V1} {D}
  {NP}{END} | 2 ,/{CONJ} {C9},/{LINK} {C9}{END} | 2 :/{K4}, {U6}{END}
P4 = In sooth, {VOC}, | {^VOC}, I swear, | I say, {VOC}, | {^OATH}, {VOC}, | {^OATH}, and yet |
  Before the {N1}, | Beneath {D} {N1}, | Beyond {D} {N1}, | Without {D} {N1}, | For all {D} {N1}, |
  2 By {D} {A1} {N1}, | In {D} {A1} {N1}, | With {D} {A1} {N1}, | O {NP}, | By day and night, | 2
  When {D} {N1} {I1s}, | While {D} {N1} {I1s}, | 2 If {D} {N1} {I1}, | Since {D} {N1} {I1s}, | From
  {N1} to {N1}, | Come {N1}, come {N1}, | And yet, methinks, | I tell {thee} plain, | More {A1} than
  {N1}, | As I do {I1}, | So {I1s} {D} {N1}: | Though {N2} {I1}, | {^thou} {know'st} full well, |
  Think on {D} {N1}: | Now, by {D} {N1},
C6 = 2 {D} {NP} {AUX} {I1} | 2 {D} {N1} {AUX} {V1} {D} {N1} | 2 {D} {N2} {V1s} {D} {N1} | 2 {D} {N1}
  hath {VP} {D} {N1} | 2 I {IAUX} {V1} {D} {A1} {N1} | I {V1} {D} {N1} of {N1} | 2 {thou} {TAUX}
  {V1} {D} {A1} {N1} | {thou} {hast} {VP} {D} {A1} {N1} | we {V1} {D} {N1} and {I1} | {D} {N1} grows
  {A1} and {A1} | {D} {N2} is but {N1} | there is no {N1} but {I1s} | let {N2} {V1} {D} {N1} | {thy}
  {NP} is {VP} | {D} {N1} of {N2} {I1s} | who {V1s} {D} {N1} must {I1} | 'tis {N2} {V1s} {D} {N1} |
  my {N1} and {N2} {I1} | {D} {N1} will not be {VP} | {D} {N1} was never {VP} | so {I1s} {D} {NP} |
  {ADV2} {D} {N2} {I1s} | {D} {THEME} is {A1} as {N1} | I {ADV2} {V1} {D} {N1} | I am {D} {N1} of
  {N1} | no {N1} {AUX} {V1} {D} {N1} | {D} {N1} {AUX} {I1} and {I1} | 2 {D} {A1} {N1} {V1s} {D} {N1}
  | I {V1} or {V1} {D} {N1}
C9 = 2 {D} {A1} {N1} {AUX} {V1} {D} {NP} | {D} {NP} {V1s} {D} {NP} | {D} {N1} of {N2} {V1s} {D} {A1}
  {N1} | {D} {N2} and {D} {N2} {MOD} {I1} | I {IAUX} {V1} {D} {NP} and {I1} | {thou} {TAUX} {V1} {D}
  {N1} and {D} {N2} | {D} {N2} {I1s} and {D} {A1} {N1} {I1s} | no {NP} {AUX} {V1} {D} {A1} {N1} |
  {ADV2} {I1s} {D} {N1} of {NP} | {D} {N1} is {VP} and {D} {NP} {I1s} | I have not {VP} {D} {NP} of
  {N1} | {D} {A2} {THEME} {AUX} {V1} {D} {N1} and {I1} | {D} {A1} {N1} {MOD} {V1} or {V1} {D} {N1} |
  2 {D} {NP} {AUX} {V1} {D} {A1} {N1}
K4 = 2 I {V1} {D} {N1} | 2 {^D} {N1} {AUX} {I1} | 2 {^D} {N2} {I1s} | {^thou} {TAUX} not {I1} | {^D}
  {N1} is {A1} | {^D} {N1} is {VP} | My {N1} is {thine} | I {IAUX} not {I1} | Let {N2} {I1} | Give
  me {D} {N1} | I am no {N1} | I dream of {N1} | So {I1s} {D} {N1} | There {I1s} {D} {N1} | Forget
  {D} {N1} | {^V1} {D} {A1} {N1} | {^I1}, {NP} | We must not {I1} | {^ADV2} I {I1} | {^N1} is not
  {N1}
T6 = 2 when {D} {NP} {I1s} | as {D} {N1} {V1s} {D} {N1} | like {D} {A1} {N1} of {N1} | beneath {D}
  {NP} | upon {D} {N1} of {N1} | in {D} {A2} {N2} | for {N2} and for {N1} | till {N2} {V1s} {D} {N1}
  | where {N1} and {N2} {I1} | without {D} {N1} of {N1} | before {D} {NP} | with {N2} in {D} {N1} |
  while {D} {N2} {AUX} {I1}
U6 = 2 and {D} {NP} {I1s} | 2 but {D} {N2} {AUX} {I1} | 2 for {D} {N1} {V1s} {D} {N1} | though {D}
  {N1} {AUX} {V1} {N1} | yet {D} {NP} is {VP} | and I {IAUX} {V1} {D} {N1} | so {D} {N1} is {A1} and
  {A1} | if {D} {N1} {V1s} {D} {N1}
Z10 = {^D} {NP} {AUX} {V1} {D} {NP} | Nor {N1} nor {N1} {AUX} {V1} {D} {NP} | Between {D} {N1} and
  {D} {NP} I {I1} | {^N1} {V1s} {D} {N1}, and {N2} {V1s} {D} {N1} | I have {VP} {N1}, and {VP} {D}
  {A2} {N2} | They say {ABSENT} hath {VP} {HIS} {N1} | {ABSENT} {AUX} {V1} {D} {NP} | Had I {thy}
  {N1}, I would {V1} {D} {NP} | More {N1}, less {N1}; more {NP}, less {N2} | {^D} {A1}, {A1} {N1}
  {MOD} {V1} and {V1} {D} {N1} | To {I1}, to {I1}, to {I1}: so {AUX} {D} {N1} | {^A1}, {A1}, {A1}
  and {A1}, {D} {NP} {I1s} | {^N1}, {N1}, {N1} and {N1}: {D} {NP} {I1s} | {^V1} {N1}, {V1} {N1}, and
  {V1} {D} {NP}
Z20 = I saw {D} {NP} of {NP}/Whose {N2} {V1s} {D} {A1} {N1} of {N1} | As {A1} as {N1} that {V1s} {D}
  {NP},/So {A1} {MOD} be {D} {N2} of {D} {N1} | Once was {D} {N1} the {N2} of {D} {N1};/And now {D}
  {NP} {AUX} {V1} {D} {N2} | If {NP} {AUX} {V1} {D} {N1} of {N2},/Then let {D} {N1} be {A1} and {N2}
  {I1}
A20 = Where is {ABSENT}? {^HE} {AUX} {V1} {D} {A1} {N1},/And {HIS} {NP} {AUX} {V1} {D} {N2}{END} | I
  had a letter late from {ABSENT}:/{^HE} {V1s} {HIS} {N1}, and {AUX} {V1} {D} {NP}{END}
Q10 = What {N1} is this that {V1s} {D} {NP}? | Who {V1s} {D} {N1} when {D} {NP} {I1s}? | Shall {D}
  {N1} {V1} {D} {NP} of {N1}? | Why {dost} {thou} {V1} {D} {N1} of {NP}? | Where is {D} {N1} that
  {AUX} {V1} {D} {N2}? | Is there no {N1} to {V1} {D} {NP}? | What is {D} {N1} but {N2} in {D} {N1}?
  | How {AUX} {D} {NP} {I1}, and {D} {N1} {I1}? | {^hast} {thou} not {VP} {D} {NP}, {VOC}? | What,
  must {D} {N2} {V1} {D} {N1} of {N1}? | {^art} {thou} so {A1}, so {A2}, and so {A1}?
PS = As {A1} as {PET} in {TUB}, {OATH}{END} | My {KIN} was {MAN}, and died of {AIL}{END} | 2 I had
  rather {DO} than {DO}{END} | He that would {DO} must first {DO}{END} | {^D} {N1} is like {PET} in
  {TUB}: it {I1s} and it {I1s}, and {V1s} {MAN}{END} | I knew {MAN} once that could {DO}, {VOC}, and
  was {VP} for it{END} | {^NUM} {HERD} and {TUB} of {FOOD}, {VOC}, for {D} {N1}{END} | Give me
  {DISH} and {TUB} to {I1} in, and let {D} {N2} {I1}{END} | {^OATH}, {thou} {TAUX} {DO} before I
  {DO}{END} | What is {MAN} without {PET}? {^SAUCE} {FOOD}{END} | Is {D} {N1} {PET}, that it should
  {I1} in {TUB}? | Did I {DO}? I did not; I did but {DO}{END} | When I was {MAN}, I would {DO} every
  morning, and {DO} on feast days{END} | There is no {N1} like {DISH}, and no {N2} like {PET}{END} |
  {^D} {JOB} hath {PET} for {a:KIN}, and {D} {JOB} hath {HERD} for {D} {N2}{END} | O {BEAST}-{PART}
  {INSULT}! {^thou} {TAUX} {DO} yet{END} | {^VOC}, my {GARB} is full of {HERD}{END} | If {D} {N1}
  {I1}, I will {DO}; and if it {I1} not, my {KIN} shall {DO}{END} | Now {D} {N2} goes {ADV2}, as
  {PET} goes to {TUB}{END} | A murrain on {D} {N1}! it hath {VP} my {GARB}{END} | {ABSENT} hath
  {a:A1} {N1}, {VOC}, and {HE} looks upon {HIS} {N2} as {PET} upon {FOOD}{END} | 2 First {I1}, then
  {I1}, then {V1} {MAN}, then {V1} {DISH}{END} | 2 {^A1} {FOOD}, {A1} {FOOD}, {A1} {FOOD}, and {PET}
  to {V1}{END} | 2 {^OATH}, I {V1} {MAN}, I {V1} {PET}, and I {V1} {DISH}{END} | 2 My {KIN} had
  {a:A1} {GARB}, {a:A1} {GARB}, and {a:A1} {JOB} to {V1}{END} | 2 {^V1} {MAN}, {V1} {PET}, {V1}
  {DISH}, and {I1}{END}
DO = kiss {MAN} | comb {PET} | teach {PET} to {I1} | {V1} {MAN} | eat {DISH} | sleep in {TUB} |
  preach to {NUM} {HERD} | dance with {PET} | put {HERD} in my {GARB} | sell my {GARB} for {FOOD} |
  marry {a:KIN} | swallow {TUB} | read to {a:INSULT} | fight {NUM} {HERD} | {V1} {PET} with {FOOD} |
  hide {MAN} in {TUB} | {V1} my {KIN} | {V1} the {BEAST} and {V1} the {JOB} | {I1} and {I1} | {I1}
  in {TUB} | {V1} {DISH} | call {MAN} {a:INSULT} | {V1} {NUM} {HERD} | sing to {PET}
PET = 2 {a:BEAST} | 3 {a:A1} {BEAST} | {a:A2} {BEAST} | {a:A1}, {A1} {BEAST}
MAN = 2 {a:JOB} | 3 {a:A1} {JOB} | {a:A2} {JOB} | {a:JOB}'s {KIN}
TUB = 2 {a:BOX} | 2 {a:A1} {BOX} | {a:JOB}'s {BOX} | {a:A2} {BOX}
DISH = 3 {SAUCE} {FOOD} | {FOOD} and {FOOD} | {FOOD} with {SAUCE} {FOOD} | {A1} {FOOD}
"""
"""From clause to sentence, in verse and (`PS`) in prose; `S` begins and ends a line."""

SPEECHES: Final = """
BODY = {S} | 3 {S}/{S} | 4 {S}/{S}/{S} | 3 {S}/{S}/{S}/{S} | {S}/{S}/{S}/{S}/{S}
PROSE = 3 {PS} | 5 {PS} {PS} | 3 {PS} {PS} {PS} | {PS} {PS} {PS} {PS}
ECHOED = 2 This {ECHO}, {VOC}, {AUX} {V1} {D} {NP}{MORE} | That {ECHO}, {VOC}, hath {VP} {D}
  {NP}{MORE} | By that same {ECHO}, {C6}{MORE} | Call it not {ECHO}: {C6}{MORE} | If {thy} {ECHO}
  {I1}, {C6}{MORE} | {^thy} {ECHO}, {VOC}, {AUX} {V1} {D} {NP}{MORE} | What {ECHO}, {VOC}? {^D} {NP}
  {AUX} {I1}{END} | {^thou} {speak'st} of {ECHO}, and {D} {N2} {AUX} {I1}{MORE} | Is it {thy} {ECHO}
  that {V1s} {D} {NP}? | What hath {thy} {ECHO} to do with {NP}?
SHORT = I {IAUX}, {VOC}; {C6}{END} | Not so, {VOC}: {C6}{END} | Ay, by {D} {N1}; {C6}{END} | Peace,
  {VOC}, peace: {C6}{END} | No, {VOC}: {C6}{END} | {^OATH}, I {IAUX} {V1} {thy} {NP}{END} | {^OATH},
  {VOC}!/{Q10} | So be it: {C6}{END}
COUPLET = {^D} {NP} {AUX} {V1} {D} {A2} {RH1},/{LINK} {D} {A1} {N1} {AUX} {V1} {D} {A2} {RH2}. |
  Then {V1} {D} {NP}, and {V1} {D} {RH1};/{LINK} let {D} {N2} {V1} {D} {A2} {RH2}. | I'll {V1} {D}
  {N1}, and {I1} beneath {D} {RH1},/Till {NP} {AUX} {V1} {D} {A1} {RH2}. | So {D} {NP} {V1s} {D}
  {A2} {RH1},/{LINK} {thou} {TAUX} {V1} {D} {A1} {N1} and {RH2}. | When {N2} {I1s}, and {N2} {V1s}
  {D} {RH1},/No {N1} {AUX} {V1} {D} {NP} of {RH2}. | Let {NP} be {VP} with {D} {RH1}:/{^D} {N1} of
  {N2} {MOD} be our {RH2}.
LINES = {K4} {T6}{MORE} | {K4}, {U6}{MORE}/{K4} {T6}{MORE} | {D10}{MORE}/{K4} {T6}{MORE} | {K4}
  {T6}{MORE}/{D10}{MORE}
D10 = {^D} {NP} {AUX} {V1} {D} {NP} | My {N1} is {VP}, and {D} {NP} {I1s} | I {V1} {D} {NP}, and
  {V1} {D} {N2}
TITLE = the {A2} {N2} | {N1} and {N2} | the {N1} of {N2} | the {NP}
verse-open = {NAMED}, what news of {D} {A2} {THEME}?/{BODY} | {NAMED}, {D} {THEME} hath {VP} {D}
  {NP}{MORE}/{BODY} | Speak, {NAMED}: who hath {VP} {D} {A2} {THEME}?/{BODY} | {^thou} {know'st},
  {NAMED}, {D} {A2} {THEME} is {VP}{MORE}/{BODY}
verse-turn = 2 Hear me, {NAMED}: {C6}{MORE} | Hear me, {NAMED}: {C6}{MORE}/{BODY} | And {thou},
  {NAMED}?/{Q10} | {NAMED}, {C6}{MORE}/{BODY} | Come, {NAMED}, {V1} {D} {NP}{MORE}
verse-reply = 5 {ECHOED} | 6 {ECHOED}/{BODY} | 3 {SHORT} | 3 {SHORT}/{BODY} | 4 {BODY}
verse-alone = O {A2} {THEME}, {D} {N1} {AUX} {V1} {thee}{MORE}/{BODY} | Now {I1s} {D} {N1}, and now
  {D} {A2} {THEME}{MORE}/{BODY} | What is {D} {THEME}? {^D} {NP} of {N1}{MORE}/{BODY} | I am {VP}:
  {D} {THEME} {V1s} {D} {NP}{MORE}/{BODY} | {Q10}/{BODY}
verse-aside = [Aside] {OWN} | [Aside] {Q10} | [Aside] {P4} {C6}{END}
verse-song = {SONG}
verse-letter = I have a letter here from {ABSENT}./[Reads]/{LINES}/Thus ever {thine} in {N1} and
  {N2}, {SIGNED}. | {^VOC}, this came to me from {ABSENT}:/[Reads]/{LINES}/{LINES}/Remember {D}
  {N1}, forget {D} {N1}. {SIGNED}.
verse-leave = Farewell, {VOC}: {C6}{MORE} | I take my leave: {C6}{MORE} | {BODY}/I go to {V1} {D}
  {NP}, {VOC}. | No more; I go to {V1} {D} {NP}{END} | {^VOC}, farewell: {C6}{MORE}
verse-announce = {BODY}/But see, here comes {NEW}, {A1} as {N1}. | {BODY}/Look where {NEW} doth come
  with {NP}. | {ECHOED}/Here {I1s} {NEW}: let {N2} be our {N1}. | {SHORT}/Soft, {NEW} comes; {D}
  {NP} {AUX} {I1}.
verse-end = 2 {BODY}/{COUPLET} | 2 {COUPLET} | {SHORT}/{COUPLET}
prose-open = {NAMED}, {hast} {thou} seen the {THEME}? {PROSE} | There's {a:A2} {THEME} for {thee},
  {NAMED}! {PROSE} | Was ever such {a:A2} {THEME}, {NAMED}? {PROSE} | {NAMED}, this {THEME} is
  {VP}{END} {PROSE}
prose-turn = And {thou}, {NAMED}, {hast} {thou} {a:INSULT} for {D} {N1}? {PROSE} | Why, {NAMED},
  {thou} {look'st} like {MAN} in {TUB}. {PROSE} | Hark {thee}, {NAMED}: I will {DO}. {PROSE}
prose-reply = 2 {^ECHO}, {VOC}? {PROSE} | {^thy} {ECHO}, {VOC}, is but {PET} in {TUB}. {PROSE} |
  This {ECHO} would make {MAN} {DO}. {PROSE} | I had {a:KIN} with just that {ECHO}. {PROSE} | Ay,
  {VOC}, and {PET} too. {PROSE} | Not I, {VOC}; I will rather {DO}. {PROSE} | 3 {PROSE}
prose-alone = Now for the {THEME}. {PROSE} | Here's the {THEME}, and here's {MAN} to mind it.
  {PROSE} | If this {THEME} be not {VP}, I am {a:INSULT}. {PROSE}
prose-aside = [Aside] {PS}
prose-song = {SONG} | {PS}/{SONG}
prose-letter = Here's a letter, and I can read, for {MAN} taught me. It is from
  {ABSENT}./[Reads]/{LINES}/{^thine}, {SIGNED}./{PS}
prose-leave = {PS} Fare {thee} well, {VOC}; I must {DO}. | I'll go and {DO}, {VOC}{END} | {PROSE}
  And so, farewell{END}
prose-announce = {PROSE} But here comes {NEW}, as {A1} as {PET}. | {PROSE} Hush, {VOC}, {NEW} is
  coming, and I must {DO}.
prose-end = {PS}/{COUPLET} | {COUPLET}
SONG = [Sings]/{^D} {A1} {N1} {I1s} beneath {D} {RH1},/Sing {N1} and {N1} and {BURDEN};/And {N2}
  {AUX} {V1} {D} {A2} {RH2},/With {N1} and {N1} and {BURDEN}. | [Sings]/O {N1} is {A1}, and {N1} is
  {A1},/And {A1} is the {A2} {RH1};/But I'll have {a:A1} {N1} and {a:A1} {N1},/And {BURDEN} under
  the {RH2}. | [Sings]/Come {V1} my {N1}, come {V1} my {RH1},/And {I1}, and {I1}, and {BURDEN};/For
  {A1} and {A1} is all {D} {RH2},/And {N1} and {N2} {I1}.
"""
"""Whole speeches by manner (verse or prose) and occasion."""
