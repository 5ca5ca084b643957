"""What the report templates say, as tables; the grammar is that of `grammar.py`.

Rules for whoever adds a line: it may state only the value that it stands for, so no word that
names another finding, and no advice. Values keep their own word in every line (a "harsh" murmur is
always called harsh), because a line is also a training target.
"""

from collections.abc import Mapping

# --- Heart -------------------------------------------------------------------------------------

MURMUR_ABSENT = (
    "no (|heart |cardiac )murmur (is|was) (heard|detected|noted|audible)",
    "there is no (|heart |cardiac )murmur",
    "(cardiac auscultation|auscultation) (reveals|shows) no murmur",
    "the heart sounds are without (|a )murmur",
    "absence of (a murmur|any murmur)",
)
MURMUR_ABSENT_NOTE = ("no murmur", "murmur absent", "murmur: absent", "murmurs: none")
MURMUR_UNKNOWN = (
    "(the presence of a murmur|whether a murmur is present) could not be determined",
    "it (is unclear|could not be determined|is not known) whether (there is a murmur"
    "|a murmur is present)",
    "the murmur status is (unknown|undetermined|uncertain)",
    "a murmur (can|could) be neither confirmed nor excluded",
)
MURMUR_UNKNOWN_NOTE = (
    "murmur status (unknown|undetermined)",
    "murmur: unknown",
    "presence of a murmur undetermined",
)
MURMUR_PRESENT = (
    "(|on auscultation, )a (|heart |cardiac )murmur (is|was) (heard|audible|noted|detected){where}",
    "there is a (|heart |cardiac )murmur{where}",
    "(cardiac auscultation|auscultation) (reveals|shows) a murmur{where}",
)
MURMUR_PRESENT_NOTE = ("murmur present{where}", "(|heart |cardiac )murmur{where}")

DESCRIBED_MURMUR = (
    "{murmur} (is|was) (heard|audible|noted|detected){where}",
    "there is {murmur}{where}",
    "(cardiac auscultation|auscultation) (reveals|shows|demonstrates) {murmur}{where}",
    "on auscultation, {murmur} is (heard|noted){where}",
)
STEPWISE_MURMUR = (
    "a {timing} murmur (is|was) (heard|audible|noted|detected){where}. "
    "(it|the {timing} murmur) has {nouns}",
    "there is a {timing} murmur{where}. (its characteristics are|it is characterised by) {nouns}",
)
DESCRIBED_MURMUR_NOTE = (
    "{timing} murmur{notes}{where}",
    "(murmur: |){murmur}{where}",
)
SEVERAL_MURMURS_WHERE = "the murmurs are (heard|audible){where}"

TIMING: Mapping[str, str] = {
    "Early-systolic": "early(-| )systolic",
    "Mid-systolic": "mid(-|)systolic",
    "Late-systolic": "late(-| )systolic",
    "Holosystolic": "holosystolic",
    "Early-diastolic": "early(-| )diastolic",
    "Mid-diastolic": "mid(-|)diastolic",
    "Late-diastolic": "late(-| )diastolic",
    "Holodiastolic": "holodiastolic",
}
# feature -> (before the word murmur, after "with", in notes); {value} is the value in lower case
FEATURE: Mapping[str, tuple[str, str, str]] = {
    "shape": (
        "{value}{shaped}",
        "a {value} (shape|configuration|contour)",
        "{value} shape|shape {value}",
    ),
    "grading": (
        "grade {value}",
        "(an |)intensity of grade {value}|a loudness of grade {value}",
        "grade {value}|graded {value}",
    ),
    "pitch": ("{value}-pitched", "(a |){value} pitch", "{value} pitch|pitch {value}"),
    "quality": ("{value}", "a {value} (quality|character|tone)", "{value} quality|quality {value}"),
}

VALVE = {"AV": "aortic", "PV": "pulmon(ic|ary)", "TV": "tricuspid", "MV": "mitral"}
ONE_VALVE = "the {valves} (area|valve area|region|site)"
SEVERAL_VALVES = "the {valves} (areas|valve areas|regions|sites)"
OTHER_SITE = "(a|an auscultation) site other than the four valve areas"
LOUDEST = "(loudest|most audible|most prominent) (over|at) {best}"
WHERE_BEST_AND_OTHERS = (
    ", {loudest}(, and| and) also (heard|audible) (over|at) {others}",
    " (over|at) {sites}, {loudest}",
)
WHERE_ONE = " (over|at) {best}, the point of (maximum|greatest) (intensity|loudness)"
WHERE_SITES = " (over|at) {sites}"
WHERE_BEST = ", {loudest}"

OUTCOME = (
    "the (clinical |overall |)outcome (is|was) {value}",
    "the outcome (is|was) (classified|rated) as {value}",
    "overall, the outcome is {value}",
)
OUTCOME_NOTE = ("outcome(:|) {value}", "{value} outcome")
HEART_RATE = (
    "(the |)heart rate (is|was) {value} (beats per minute|beats/min|bpm)",
    "the heart beats at {value} (beats per minute|bpm)",
)
HEART_RATE_NOTE = ("heart rate(:|) {value} (beats per minute|beats/min|bpm)",)

# --- Recording ---------------------------------------------------------------------------------

AT_AREA = " (over|at) {area}"  # where a recording was made says nothing of a murmur
IN_POSTURE = (" with the (patient|subject) {posture}", " in (the|a) {posture} position")
RECORDED = (
    "the recording (is|was) (made|taken){place}",
    "(the |)auscultation (is|was) performed{place}",
    "this is a recording{place}",
)
RECORDED_NOTE = ("recorded{place}", "recording{place}", "recording made{place}")

# --- Lung --------------------------------------------------------------------------------------

AT_CHEST = " (over|at) the {site}"
SOUNDS_PRESENT = (
    "{sounds} (are|were) (heard|audible|present|noted){at}",
    "there are {sounds}{at}",
    "(lung auscultation|auscultation) (reveals|shows) {sounds}{at}",
)
SOUNDS_PRESENT_NOTE = ("{sounds}{at}", "{sounds} present{at}")
SOUNDS_ABSENT = (
    "no {sounds} (are|were) (heard|audible|noted|detected){at}",
    "there are no {sounds}{at}",
    "(lung auscultation|auscultation) (reveals|shows) no {sounds}{at}",
    "{sounds_not} absent{at}",
)
SOUNDS_ABSENT_NOTE = ("no {sounds}{at}", "without {sounds}{at}")
SOUNDS_MIXED = (
    "{present} (are|were) (heard|audible|present|noted){at}(, with no|, without|, but no) {absent}",
    "there are {present}{at}(, with no|, without|, but no) {absent}",
    "(lung auscultation|auscultation) (reveals|shows) {present} (but no|without) {absent}{at}",
    "no {absent} (are|were) heard{at}, (but|while) {present} are (present|audible|noted)",
)
SOUNDS_MIXED_NOTE = (
    "{present} (but no|without) {absent}{at}",
    "{present} present, {absent} absent{at}",
)
CHEST_ONLY = (
    "the recording (is|was) (made|taken) (over|at) the {site}",
    "the (auscultation|recording) site (is|was) the {site}",
)
CHEST_ONLY_NOTE = ("recorded (over|at) the {site}", "(auscultation |recording |)site: {site}")
RESPIRATORY_RATE = (
    "(the |)respiratory rate (is|was) {value} (breaths per minute|breaths/min)",
    "(the subject|the patient) (is|was) breathing at {value} breaths per minute",
)
RESPIRATORY_RATE_NOTE = ("respiratory rate(:|) {value} (breaths per minute|breaths/min)",)

# --- Diagnosis ---------------------------------------------------------------------------------

DIAGNOSIS = (
    "the (clinical |)diagnosis (is|was) {name}",
    "(the patient|the subject) (has|had) a diagnosis of {name}",
    "(the patient|the subject) (is|was) diagnosed with {name}",
)
DIAGNOSIS_NOTE = ("diagnosis(:|) {name}", "diagnosed with {name}")
DIAGNOSIS_STATE = (  # "normal" and "healthy" are not diseases that one is diagnosed with
    "the (clinical |)diagnosis (is|was) {name}",
    "the (subject|person) (is|was) (classified|labelled|diagnosed) as {name}",
)
DIAGNOSIS_STATE_NOTE = ("diagnosis(:|) {name}", "classified as {name}", "labelled {name}")

# organ -> sentences for a row that holds nothing but a diagnosis; the first ones are the prompts
# of the nearest class sentence
DISEASE_ONLY: Mapping[str, tuple[str, ...]] = {
    "heart": (
        "heart sounds (of|consistent with|typical of) {name}",
        "cardiac auscultation of a patient with {name}",
        "(heart sound recording|phonocardiogram) (showing|of) {name}",
        "{name} on cardiac auscultation",
        "(cardiac|heart) auscultation (shows|reveals|demonstrates|is consistent with) {name}",
        "the (heart sounds|auscultatory findings|cardiac sounds) are (consistent with"
        "|characteristic of|in keeping with) {name}",
        "(cardiac auscultation|phonocardiogram|heart sounds|auscultation of the heart): {name}",
        "{name} (is|was) (identified|recognised|heard|found) on (cardiac |heart |)auscultation",
        "the (patient|subject) has {name}",
        "(diagnosis|cardiac diagnosis|diagnosis on auscultation of the heart): {name}",
        "heart sounds recorded from a (patient|person|subject) with {name}",
    ),
    "lung": (
        "lung sounds (of|consistent with|typical of) {name}",
        "lung auscultation of a patient with {name}",
        "(lung|respiratory) sound recording (showing|of) {name}",
        "{name} on chest auscultation",
        "(lung|chest) auscultation (shows|reveals|demonstrates|is consistent with) {name}",
        "the (lung sounds|respiratory sounds|auscultatory findings) are (consistent with"
        "|in keeping with) {name}",
        "(lung auscultation|respiratory sounds|lung sounds|auscultation of the chest): {name}",
        "the (patient|subject) has {name}",
        "(diagnosis|respiratory diagnosis): {name}",
        "lung sounds recorded from a (patient|person|subject) with {name}",
    ),
    "": (
        "recording (of|from) a (patient|subject|person) with {name}",
        "a recording consistent with {name}",
        "the diagnosis is {name}",
        "diagnosis: {name}",
        "the (patient|subject|person) (has|had) {name}",
        "the (patient|subject|person) (is|was) diagnosed with {name}",
        "the recording (shows|is from a person with|is consistent with) {name}",
        "findings (consistent with|in keeping with|of) {name}",
    ),
}
NORMAL_ONLY: Mapping[str, tuple[str, ...]] = {
    "heart": (
        "normal heart sounds",
        "normal cardiac auscultation",
        "normal (heart sound recording|phonocardiogram)",
        "(the heart sounds|heart sounds) are normal",
        "(cardiac|heart) auscultation (is|was) normal",
        "the (heart sound recording|phonocardiogram|cardiac auscultation) is normal",
        "heart sounds (are |)within normal limits",
        "(cardiac auscultation|phonocardiogram|heart sounds|auscultation of the heart): normal",
        "(cardiac auscultation was|the heart sounds were) (judged|found) normal",
        "(diagnosis|cardiac diagnosis): normal",
    ),
    "lung": (
        "normal (lung|breath) sounds",
        "normal (lung|chest) auscultation",
        "normal (lung|respiratory) sound recording",
        "(the |)(lung|breath) sounds are normal",
        "(lung|chest) auscultation (is|was) normal",
        "(lung|breath) sounds (are |)within normal limits",
        "(lung auscultation|respiratory sounds|lung sounds|auscultation of the chest): normal",
        "(diagnosis|respiratory diagnosis): normal",
    ),
    "": (
        "normal recording",
        "a normal (auscultation |)recording",
        "(the |)(auscultation|recording|auscultation recording) (is|was) normal",
        "normal auscultation",
        "normal findings on auscultation",
        "auscultation (is |)within normal limits",
        "the (recording is|findings are|recorded sounds are) within normal limits",
        "diagnosis: normal",
    ),
}
HEALTHY_ONLY: Mapping[str, tuple[str, ...]] = {
    organ: (
        f"{sounds} of a healthy (subject|person|individual)",
        "a healthy (subject|person|individual)",
        "the (subject|person|individual) (is|was) healthy",
        f"{sounds}, (healthy|from a healthy (subject|person|individual))",
        "(diagnosis|clinical status): healthy",
    )
    for organ, sounds in {
        "heart": "heart sounds",
        "lung": "lung sounds",
        "": "recording",
    }.items()
}
FINDING_ONLY = (  # {name} is a sound, as in "a systolic murmur" or "fine crackles"; {be} is or are
    "{name} {be} (heard|present|audible|noted|detected)",
    "{sounds} with {name}",
    "{auscultation} (reveals|shows|demonstrates) {name}",
    "{name} on {auscultation}",
    "{sounds}: {name}",
    "there {be} {name}",
    "{sounds} recorded from a (patient|person|subject) with {name}",
    "on auscultation, {name} {be} (heard|noted)",
)
ORGAN_WORDS: Mapping[str, tuple[str, str]] = {
    "heart": ("heart sounds", "cardiac auscultation"),
    "lung": ("lung sounds", "lung auscultation"),
    "": ("recorded sounds", "auscultation"),
}
NOTHING_SAID: Mapping[str, str] = {
    "heart": "Recording of heart sounds.",
    "lung": "Recording of lung sounds.",
    "": "Recording of an auscultation.",
}
NOTES_HEAD = ("", "", "auscultation: ", "findings: ")
