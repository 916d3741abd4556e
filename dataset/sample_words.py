"""Word lists of the bundled data set: common English words that a small model meets often enough to learn.

It knows nothing of tasks, splits or files; the lists are short where a task needs every word seen many times.
"""

# Few and short: logic and word problems compare names, and each name must be met often enough to be told apart.
NAMES = ("Tom", "Ann", "Max", "Sam", "Ben", "Kate", "Jack", "Lucy", "Paul", "Mary", "John", "Emma")

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# What "count" counts. No word belongs to two kinds.
KINDS = {
    "animals": ("cat", "dog", "cow", "horse", "bird", "fish", "bear", "lion"),
    "colours": ("red", "blue", "green", "black", "white", "brown", "yellow", "pink"),
    "foods": ("apple", "bread", "rice", "cheese", "egg", "cake", "soup", "corn"),
}

# What lists and positions are made of.
LIST_WORDS = tuple(word for kind in KINDS.values() for word in kind)

GOODS = ("tea", "milk", "bread", "rice", "salt", "cake", "soup", "corn")

THINGS = ("books", "cards", "coins", "pens", "balls", "keys")

# Words that are given letter by letter, three to five letters each; many with j, q, x and z, or those letters would be
# met too rarely to be learned.
_SPELLING = """
    able acid aged also area army away axe axis baby back bad bag bake ball band bank bar bark base bath bay bead
    bean bear beat bed bee beef bell belt bench bend best big bike bill bind bird bite black blade blame blank blind
    block blood blow blue board boat body bold bone book boot born boss both bowl box boy brain brave bread break
    brick bring broad brown brush build bulb burn bus bush busy buzz cake calf call calm camel camp can candy cap
    car card care cart case cash cat catch cave chain chair chalk charm cheap check chest chief child chin city
    claim class claw clay clean clear climb clock close cloth cloud club coal coast coat code coin cold comb come
    cook cool copy coral corn cost couch count court cover cow crab craft crash crazy cream crop cross crowd crown
    cry cup curve cut daily dairy damp dance dark data date dawn day dear debt deck deep deer desk diet dirt dish
    dive dizzy dock dog door dose down dozen draft drama draw dream dress drink drive drop drum dry duck dust duty
    each eagle ear early earth east easy eat edge egg eight elbow empty end enjoy enter equal equip even event every
    exact exam exist exit extra eye fable face fact fair faith fall fame farm fast fat fault fear feast feed feel
    fence field fifty fight film find fine fire firm first fish five fix fizz flag flame flat fleet flock floor
    flour flow fly foam focus fog fold food foot force fork form fort forty found four fox frame fresh frog front
    froze fruit fuel full fun fuzzy game gate gaze gear ghost giant gift girl give glad glass glaze globe glove glue
    goal goat gold golf good grain grand grape graph grass gray great green grey grip group grow guard guess guest
    guide gulf habit hair half hall hand happy hard hat have head heart heat heavy help herb hero hide high hill
    hint hold hole home honey hope horn horse hot hotel hour house human hunt ice idea inch index iron item jail jam
    jar jaw jazz jeans jelly jet jewel job jog join joke jolly joy judge jug juice juicy jump juror jury just keen
    keep key kick kind king kite knee knife knot know label lady lake lamb lamp land large last laugh law layer lazy
    leaf learn left leg lemon level life lift light limit line lion lip list live load loan local lock log long look
    lord loss loud love loyal luck lunch lung magic mail main major make map march mark match math maze meal meat
    medal meet melon melt menu metal mild mile milk mill mind mine mint mix model month moon more moth motor mouse
    mouth move much mud music nail name near neat neck need nerve nest never new news next nice night ninja noble
    noise north nose note novel nurse nut oak ocean offer oil old olive one onion open opera orbit order organ oven
    owl own oxen oxide pack page paint pair palm panel paper park party pass past path peace peach pear pen phone
    photo piano pick pig pilot pine pipe pixel pizza place plain plane plant plate play plum poem poet point pond
    pony pool poor port post pot pound power press price pride prize proof proud pull pump pure push quack queen
    quest queue quick quiet quilt quit quite quiz quote race radio rain raise ranch range rank rate razor reach read
    ready relax rest rice rich ride right ring river road roast robin rock role roof room root rope rose rough round
    route row royal rule run rush sad safe sail salad salt same sand sauce save scale scene score sea seat seed
    seize sell sense seven shade shape share shark sharp sheep sheet shelf shell shine ship shirt shoe shop shore
    short show sick side sign silk sing sink six sixty size skill skin skirt sky sleep slice slow small smart smile
    smoke snake snow soap sock soft soil solid song sort soul sound soup south space spark speak speed spell spice
    spoon sport spot squad squat squid stack staff stage stair stamp stand star steam steel stem step stick stone
    store storm story stove straw sugar suit sun sweet swim table tail talk tall tank task taste tax taxi tea teach
    team tell tent test text thank thick thin thumb tide tiger time tiny title toast today toe tool tooth total
    touch tower town toy track trade train tree trick trip truck true trunk trust truth tube twin two uncle under
    unit upper urban use valid value van vase veil verb very vest video view visit vivid voice vote wagon walk wall
    waltz want warm wash watch water wave wax weak wear week well west whale wheat wheel white wide wife wild wind
    wine wing wise wish wolf wood wool word work world wrist write yard year young youth zebra zero zinc zip zone
    zoo
"""
SPELLING_WORDS = tuple(_SPELLING.split())
