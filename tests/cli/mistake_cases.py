"""Mistakes of new users, and the program's answers; none of them loads a model.

A letter stands for a beginning in ``mistakes.FORMS``; ``Y |…`` is a merge file, ``Z |…`` its end.
Names in braces are files of :func:`mistakes.make_mess`. A comment is a group.
"""

# ruff: noqa: E501
CASES = [
    # program
    ("mrge", "No such command 'mrge'. Did you mean 'merge'?"),
    ("merge", "Missing option '--output' / '-o'."),
    ("merge {base} -o", "Option '-o' requires an argument."),
    ("merge {base} --out x.safetensors", "No such option: --out (Possible options"),
    ("M --rank 8", "rank is a setting of the method: --set rank=VALUE. All options:"),
    ("C --block-steps 8", "block_steps is a setting of the method: --set block_steps=VALUE."),
    ("merge {base} -o {out}", "Give the LoRAs with --concept, or a merged file with --from"),
    ("merge {base} {base} -o {out}", "Got unexpected extra argument(s) ({base})"),
    ("methods iterris", "There is no method 'iterris'; did you mean 'iteris'"),
    ("doctor now", "Got unexpected extra argument(s) (now)"),
    # a part of a LoRA
    ("merge {base} -o {out} --concept {one}:s1:dog,blocks=1,2", "blocks='1,2' has 2 weights"),
    ("merge {base} -o {out} --concept {one}:s1:dog,blocks=OUTSIDE", "nor one of NONE, ALL, INS"),
    ("merge {base} -o {out} --concept {one}:s1:dog,layers=a,,b", "has an empty pattern"),
    # base
    (
        "merge {tmp}/none -o {out} --concept {one}:s1:dog",
        "The base '{tmp}/none' does not exist: there is no such folder or file, and a hub name has the form",
    ),
    (
        "merge none.safetensors -o {out} --concept {one}:s1:dog",
        "The base 'none.safetensors' does not exist",
    ),
    (
        "merge {tmp} -o {out} --concept {one}:s1:dog",
        "The base '{tmp}' cannot be loaded: the folder has no model_index.json",
    ),
    (
        "merge {tmp}/lines.txt -o {out} --concept {one}:s1:dog",
        "The base '{tmp}/lines.txt' is not a .safetensors file",
    ),
    (
        "merge {tmp}/pointer.safetensors -o {out} --concept {one}:s1:dog",
        "{tmp}/pointer.safetensors is a Git LFS pointer",
    ),
    (
        "merge {one} -o {out} --concept {one}:s1:dog",
        "The base '{one}' is a LoRA, not a model; give the model for which it was made",
    ),
    ("merge {base} -o {out} --concept {one}:s1", "or FILE,trigger=sks without a class"),
    # the LoRA files
    (
        "L {tmp}/nan.safetensors:a:b",
        "contains NaN or infinite values; the file is broken or its training diverged",
    ),
    ("L {tmp}/part.safetensors:a:b", "which are not a complete change; its other half"),
    (
        "merge {base} -o {tmp}/mine.safetensors --concept {tmp}/with_emb.safetensors:a:b",
        "{tmp}/mine_emb.safetensors exists already; choose another name",
    ),
    ("L {one}:s1:dog,blocks=NONE", "{one}: blocks='NONE' leaves nothing of it; leave it out"),
    ("L {tmp}/none.safetensors:a:b", "{tmp}/none.safetensors does not exist or is not a file"),
    (
        "L {tmp}/pointer.safetensors:a:b",
        "{tmp}/pointer.safetensors is a Git LFS pointer, a few lines of text in place of the real",
    ),
    (
        "L {tmp}/page.safetensors:a:b",
        "{tmp}/page.safetensors is a web page, not a safetensors file",
    ),
    (
        "L {tmp}/pickle.safetensors:a:b",
        "{tmp}/pickle.safetensors is a pickled PyTorch file, which could run code when opened",
    ),
    (
        "L {tmp}/zip.safetensors:a:b",
        "{tmp}/zip.safetensors is a pickled PyTorch file, which could run code when opened",
    ),
    ("L {tmp}/cut.safetensors:a:b", "{tmp}/cut.safetensors is not a complete safetensors file"),
    (
        "L {tmp}/letter.safetensors:a:b",
        "{tmp}/letter.safetensors is not a complete safetensors file",
    ),
    ("L {tmp}/huge.safetensors:a:b", "{tmp}/huge.safetensors is not a complete safetensors file"),
    ("L {tmp}/model.safetensors:a:b", "{lora} is a whole model (a checkpoint), not a LoRA"),
    ("L {tmp}/nothing.safetensors:a:b", "{tmp}/nothing.safetensors contains no tensors"),
    ("L {tmp}/emb.safetensors:a:b", "{tmp}/emb.safetensors is another kind of file, not a LoRA"),
    # concepts
    ('L ""', "--concept '' has neither a file nor prompts that preserve the base"),
    ("L :", "--concept ':' is not FILE:TRIGGER:CLASS, FILE:TRIGGER:CLASS:STRENGTH or"),
    ("L {one}:s1", "--concept '{one}:s1' is not FILE:TRIGGER:CLASS"),
    (
        "L {one}:s1:dog:abc",
        "--concept '{one}:s1:dog:abc': the strength must be a number such as 0.8, or two such as 0.8/0.5",
    ),
    ("L {one}:s1:dog:nan", "--concept '{one}:s1:dog:nan': the strength must be a number"),
    ("L {one}:s1:dog:1:2", "--concept '{one}:s1:dog:1:2': the strength must be a number"),
    ("L {one}:s1:dog:1/x", "--concept '{one}:s1:dog:1/x': the strength must be a number"),
    ("L {one}:s1:dog:0", "There is nothing to merge: every concept has strength or weight 0"),
    (
        "L {one}:s1:dog,weight=0",
        "There is nothing to merge: every concept has strength or weight 0",
    ),
    (
        "L {one}:s1:dog,weight=-1",
        "--concept '{one}:s1:dog,weight=-1': weight must be at least 0, not '-1'",
    ),
    (
        "L {one}:s1:dog,weight=nan",
        "--concept '{one}:s1:dog,weight=nan': weight must be a number, not 'nan'",
    ),
    ("L {one}:s1:dog,wieght=2", "there is no key 'wieght'; did you mean 'weight'"),
    (
        "L {one}:s1:dog,weight=1,weight=2",
        "--concept '{one}:s1:dog,weight=1,weight=2' gives weight twice",
    ),
    ("L {one}:s1:dog,trigger=x", "--concept '{one}:s1:dog,trigger=x' gives trigger twice"),
    (
        "L {one}:s1:dog,kind=stile",
        "--concept '{one}:s1:dog,kind=stile': kind must be one of subject, style, tags, video, not",
    ),
    ("L {one}:s1:dog,prompts=none.txt", "none.txt does not exist or is not a file"),
    ("L {one}:s1:dog,prompts={tmp}/latin.txt", "{tmp}/latin.txt is not text in UTF-8 (byte 3)"),
    (
        "L {one}:s1:dog,prompts={tmp}/zeros.txt",
        "{tmp}/zeros.txt is not a text file: it contains null bytes",
    ),
    ("L {one}:s1:dog,prompts={tmp}/empty.txt", "{one}: its list of prompts is empty."),
    ("L {one}:s1:dog,samples={tmp}/lines.txt", "{one}: samples are for transformers models"),
    ("L {one}:s1:dog,text_strength=much", "--concept '{one}:s1:dog,text_strength=much'"),
    (
        "L trigger=sks",
        "--concept 'trigger=sks' has neither a file nor prompts that preserve the base",
    ),
    (
        "L {tmp}/adapter:{tmp}/lines.txt",
        "--concept '{tmp}/adapter:{tmp}/lines.txt' is not FILE:TRIGGER:CLASS,",
    ),
    (
        "L https://civitai.com/models/1:s1:dog",
        "https:/civitai.com/models/1 does not exist or is not a file",
    ),
    ("L s1:dog:{one}", "s1:dog:{one} does not exist or is not a file"),
    ('L "{one} s1 dog"', "--concept '{one} s1 dog' is not FILE:TRIGGER:CLASS"),
    # settings
    ("M --set rank", "--set 'rank': write NAME=VALUE, such as rank=16"),
    ("M --set rnak=3", "there is no setting 'rnak'; did you mean 'rank'"),
    ("M --set rank=0", "--set 'rank=0': rank must be at least 1, not 0"),
    ("M --set rank=1.5", "--set 'rank=1.5': rank must be a whole number, at least 1, not 1.5"),
    (
        "M --set =3",
        "--set '=3': there is no setting ''. iteris methods METHOD lists a method's settings",
    ),
    ("M --set smaples=3", "there is no setting 'smaples'; did you mean 'samples'"),
    ("M --set guidance=nan", "--set 'guidance=nan': guidance must be at least 0, not nan"),
    ("M --set contexts=2", "--set 'contexts=2': contexts must be in [0, 1], not 2.0"),
    (
        "M --set latents=noisy",
        "--set 'latents=noisy': latents must be one of denoising, noise, not 'noisy'",
    ),
    ("M --set ridge=-1", "--set 'ridge=-1': ridge must be in [0, 1), not -1.0"),
    ("M --set repair=maybe", "--set 'repair=maybe': repair must be true or false, not 'maybe'"),
    ("M --set ties.density=0.3", "--set 'ties.density=0.3': there is no setting 'ties.density'"),
    ("M --method ties --set density=2", "--set 'density=2': density must be in (0, 1], not 2.0"),
    ("M --method iterris", "There is no method 'iterris'; did you mean 'iteris'"),
    (
        "M --preset bst",
        "Invalid value for '--preset': Value error, 'bst' is not one of 'default', 'fast', 'best',",
    ),
    ("M --samples 0", "samples must be at least 1, not 0."),
    ("M --samples many", "Invalid value for '--samples': Input should be a valid integer"),
    ("M --timesteps 11", "timesteps (11) cannot exceed denoising_steps"),
    ("M --timesteps 5 --denoising-steps 3", "timesteps (5) cannot exceed denoising_steps"),
    (
        "M --latents none",
        "Invalid value for '--latents': Value error, 'none' is not one of 'denoising', 'noise'",
    ),
    ("M --guidance x", "Invalid value for '--guidance': Input should be a valid number"),
    ("M --empty-share 1", "empty_share must be in [0, 1), not 1.0"),
    ("M --minutes 0", "minutes must be above 0, not 0.0 (or none)"),
    ("M --minutes long", "minutes must be above 0, not 'long' (or none)"),
    ("M --templates {tmp}/none.txt", "{tmp}/none.txt does not exist or is not a file"),
    ("M --templates {tmp}/lines.txt", 'templates must hold "{}" where the concept goes'),
    ("M --preserve {tmp}/none.txt", "{tmp}/none.txt does not exist or is not a file"),
    ("M --preserve {tmp}/empty.txt", "preserve: its list of prompts is empty"),
    (
        "M --preserve {tmp}/lines.txt --preserve-weight -1",
        "Invalid value for '--preserve-weight': Input should be greater than or equal to 0",
    ),
    ("M --energy 0", "energy must be above 0 and at most 1, not 0.0"),
    ("M --energy nan", "energy must be above 0 and at most 1, not nan"),
    ("M --rename x", "--rename 'x' is not LORA:NAME=NEW or NAME=NEW"),
    ("M --rename x=y", "--rename 'x=y' matches no embedding of these LoRAs, which have none"),
    (
        "M --unmergeable ignore",
        "Invalid value for '--unmergeable': Value error, 'ignore' is not one of 'refuse', 'skip', 'mean'",
    ),
    (
        "M --dtype int8",
        "Invalid value for '--dtype': Value error, 'int8' is not one of 'float16', 'bfloat16', 'float32'",
    ),
    ("M --memory -1", "Invalid value for '--memory': Input should be greater than or equal to 0"),
    ("M --device gpu", "--device 'gpu' is not a torch device; give cpu, cuda, cuda:1, …"),
    ("M --device cuda", "finds no cuda device here"),
    ("M --generate 8", "--generate is for transformers models"),
    ("M --model-class AutoModel", "--model-class is for transformers models"),
    ("M --image {tmp}/lines.txt", "{tmp}/lines.txt is not a readable image"),
    ("M --loras {tmp}", "--loras is for --from; --concept already names the LoRA files"),
    # outputs
    ("M -o {tmp}", "{tmp} must end in .safetensors."),
    ("M -o out.safetensor", "out.safetensor must end in .safetensors"),
    ("M -o {tmp}/none/out.safetensors", "The folder {tmp}/none does not exist; create it first"),
    ("M -o {one}", "{one} exists already; choose another name, or overwrite it"),
    (
        "M -o {world}/../world/lora1.safetensors --overwrite",
        "is one of the LoRAs to merge and would",
    ),
    ("M -o {one} --overwrite", "{one} is one of the LoRAs to merge and would be lost"),
    ('M -o ""', ". must end in .safetensors."),
    ("M -o {tmp}/none/merge.yaml", "The folder {tmp}/none does not exist; create it first"),
    # from
    ("merge --from none.safetensors -o {out}", "none.safetensors does not exist or is not a file"),
    ("merge {base} --from {one} -o {out}", "{one} has no complete merge recipe in its metadata"),
    (
        "merge {base} --from {merged} -o {out}",
        "lora1.safetensors is not in any of the folders {tmp}, .",
    ),
    (
        "merge --from {merged} --loras {world} -o {out}",
        "There is no base to merge on. The file names none",
    ),
    ("F {merged} --concept {one}", "Give the LoRAs with --concept, or a merged file with --from"),
    (
        "F {merged} --preset fast",
        "--preset does not work with --from, which already has all settings",
    ),
    (
        "F {merged} --method ties",
        "--method does not work with --from, which already has all settings",
    ),
    ("F {merged} --set rnak=2", "there is no setting 'rnak'; did you mean 'rank'"),
    (
        "merge {base} --from {changed} --loras {tmp}/others -o {out}",
        "{tmp}/others/lora1.safetensors is not the file that was merged",
    ),
    ("F {broken}", "{broken} has no complete merge recipe in its metadata"),
    ("F {nanstrength}", "and strength, a finite number"),
    ("F {badcut}", "The cut {'rank': 0, 'ordered': True} is invalid"),
    # merge files
    ("Y", "merge.yaml is empty; iteris init FOLDER writes one for your LoRAs"),
    (
        'Y |base: ~/none\\nconcepts: ["{one}:s1:dog"]',
        "The base '~/none' does not exist: there is no such folder or file",
    ),
    (
        'Y |base: {base}\\nconcepts: ["~/none.safetensors:s1:dog"]',
        "~/none.safetensors is not in any of the folders",
    ),
    (
        "Y |base: {base}\\nconcepts: [{file: {one}, trigger: x, always_on: yes}]",
        "merge.yaml: concept 1: always_on must be one of no, include, outside, not 'yes'",
    ),
    ("Y |- a", "merge.yaml: the file must be a mapping of names to values, not ['a']"),
    (
        "Y |base: [",
        "merge.yaml is not valid YAML: while parsing a flow node expected the node content, but found",
    ),
    (
        "Y |base: {base}",
        "merge.yaml has no LoRAs: list them under concepts:, or give them with --concept",
    ),
    ("Y |base: {base}\\nconcepts: cat", "merge.yaml: concepts must be a list, not 'cat'"),
    (
        "Y |base: {base}\\nconcepts: [3]",
        "merge.yaml: concept 1 must be FILE:TRIGGER:CLASS or a mapping, not 3",
    ),
    (
        "Y |base: {base}\\nconcepts: [{file: {one}, triger: x}]",
        "there is no key 'triger'; did you mean 'trigger'",
    ),
    (
        "Y |base: {base}\\nconcepts: [{file: {one}, trigger: [x]}]",
        "merge.yaml: concept 1: trigger must be text, not ['x']",
    ),
    (
        "Y |base: {base}\\nconcepts: [{file: {one}, weight: much}]",
        "merge.yaml: concept 1: weight must be a number, not 'much'",
    ),
    ("Y |base: {base}\\nconcepts: [{file: {one}, strength: true}]", "strength must be a number"),
    ("Y |base: {base}\\nconcepts: [{file: {one}, prompts: 3}]", "prompts must be a list"),
    ("Y |base: {base}\\nconcepts: [{file: {one}, reading: 3}]", "reading must be a mapping"),
    ("Y |concepts: [{file: {one}}]\\nmethod: magic", "There is no method 'magic'"),
    ("Y |concepts: [{file: {one}}]\\noffload: all", "merge.yaml: offload:"),
    (
        "Y |base: {base}\\nconcepts: [{trigger: x}]",
        "merge.yaml: concept 1 has neither a file nor prompts that preserve the base",
    ),
    ("Y |base: {base}\\nconcepts: [none.safetensors:a:b]", "pass its folder with --loras. [IT-08]"),
    ("Z |settings: 3", "merge.yaml: settings must be a mapping of names to values, not 3"),
    ("Z |settings: {rnak: 3}", "there is no setting 'rnak'; did you mean 'rank'"),
    ("Z |settings: {rank: -3}", "merge.yaml: settings: rank must be at least 1, not -3"),
    ("Z |calibration: {samples: 0}", "merge.yaml: calibration: samples must be at least 1, not 0"),
    (
        "Z |calibration: {templates: a cat}",
        "merge.yaml: calibration: templates must be a list of strings, not 'a cat'",
    ),
    ("Z |ouput: x.safetensors", "there is no key 'ouput'; did you mean 'output'"),
    ("Z |output: [x]", "merge.yaml: output: Input is not a valid path for <class 'pathlib.Path'>"),
    ("Z |plan: perhaps", "merge.yaml: plan: Input should be a valid boolean"),
    ("Z |rank: 3", "merge.yaml: there is no key 'rank'"),
    (
        "Y |base: {base}\\nbase: x",
        "merge.yaml is not valid YAML: the key 'base' occurs twice in \"<unicode string>\", line 2, column",
    ),
    ("Z |cut: 3", "merge.yaml: cut must be a mapping of names to values, not 3"),
    (
        "Z |cut: {rank: 3}",
        "The cut {'rank': 3} is invalid: it needs rank, a whole number of at least 1, with ordered, true",
    ),
    ("Z |cut: {strength: .nan}", "and strength, a finite number"),
    ('Y |base: 3\\nconcepts: ["{one}:s1:dog"]', "The base '3' does not exist"),
    ('Y |base:\\nconcepts: ["{one}:s1:dog"]', "Name the base: BASE on the command line, or base"),
    ("merge none.yaml -o {out}", "none.yaml does not exist or is not a file"),
    (
        "merge {tmp}/latin.yaml -o {out}",
        "{tmp}/latin.yaml is not valid YAML: 'utf-8' codec can't decode byte 0xe9 in position 6",
    ),
    # transformers
    ("T {tmp}/adapter", "{tmp}/adapter is not FOLDER:SAMPLES, such as adapters/joy:joy.txt"),
    ("T {tmp}/adapter:none.txt", "none.txt does not exist or is not a file"),
    ("T {tmp}/none:{tmp}/lines.txt", "{tmp}/none is not a peft adapter folder"),
    ("T {tmp}/adapter:{tmp}/empty.txt", "{empty}.txt has no samples; write one per line"),
    (
        "T {tmp}/adapter:{tmp}/cut.safetensors",
        "{tmp}/cut.safetensors is not a complete safetensors file",
    ),
    (
        "T {tmp}/adapter:{tmp}/lines.txt:much",
        "--concept '{tmp}/adapter:{tmp}/lines.txt:much' is not FOLDER:SAMPLES or",
    ),
    (
        "T {tmp}/adapter:{tmp}/lines.txt,class=x",
        "{tmp}/adapter: prompts, class and text_strength are for diffusion bases",
    ),
    (
        "merge {tmp}/model -o {empty} --concept {tmp}/adapter:{tmp}/lines.txt --overwrite",
        "--overwrite is for files; give another folder, or move the old one",
    ),
    (
        "merge {tmp}/model -o {tmp} --concept {tmp}/adapter:{tmp}/lines.txt",
        "{tmp} exists already; choose another name",
    ),
    (
        "T {tmp}/adapter:{tmp}/lines.txt --preserve {tmp}/lines.txt",
        "--preserve is for diffusion bases; {tmp}/model is a single model",
    ),
    # compare
    ("compare", "Missing argument 'base'."),
    ("compare {base} -o {results}", "Missing option '--concept'."),
    ("C --refs {pics}", "Give --refs once for each --concept, in the same order, or not at all"),
    ("C --methods iterris", "There is no method 'iterris'; did you mean 'iteris'"),
    ('C --methods ""', "--methods is empty; give names, such as base,alone,average,iteris"),
    ("C --set iteris.rnak=1", "there is no setting 'rnak'; did you mean 'rank'?"),
    ("C --set rnak=3", "there is no setting 'rnak'; did you mean 'rank'"),
    ("C --set ties.density=3", "'ties' is not among the methods to compare"),
    ("C --size 63", "--size '63': both sides must be multiples of 8, such as 64x64"),
    ("C --size big", "--size 'big' is not a number of pixels, or WIDTHxHEIGHT"),
    ("C --steps 0", "steps must be at least 1, not 0."),
    ("C --images-per-prompt 0", "images_per_prompt must be at least 1, not 0"),
    ("C --guidance nan", "guidance must be a number, not nan."),
    ("C --scheduler Nope", "There is no scheduler 'Nope' in diffusers"),
    ("C --prompts none.txt", "none.txt does not exist or is not a file"),
    ("C --prompts {tmp}/empty.txt", "There are no prompts to draw."),
    (
        "C --prompts {tmp}/nine.txt",
        "Prompt 'a {9}' has a placeholder other than {all}, {each} or {1} to {1}",
    ),
    ("C --together 5", "5 of 1 concepts cannot be merged together"),
    ("C -o {tmp}/lines.txt", "{tmp}/lines.txt is a file; give a folder for the results"),
    (
        "C -o {tmp}/lines.txt/x",
        "{tmp}/lines.txt/x cannot be created: {tmp}/lines.txt is not a writable folder",
    ),
    ("C -o {done}", "{done} has the results of a comparison"),
    ("C --samples 0", "samples must be at least 1, not 0."),
    (
        "compare {base} -o {results} --concept {one}:s1:dog --refs {tmp}/none",
        "{tmp}/none is neither an image nor a folder of images",
    ),
    (
        "compare {base} -o {results} --concept {one}:s1:dog --refs {tmp}/lines.txt",
        "{tmp}/lines.txt is not a readable image",
    ),
    (
        "compare {base} -o {results} --concept none.safetensors:s1:dog --refs {pics}",
        "none.safetensors does not exist or is not a file",
    ),
    (
        "compare {tmp}/none -o {results} --concept {one}:s1:dog --refs {pics}",
        "The base '{tmp}/none' does not exist: there is no such folder or file",
    ),
    # score
    ("score", "Missing argument 'images'."),
    ("score {pic}", "Nothing to score against: give --refs, --prompts or both"),
    ("score none.png --refs {pics}", "none.png is neither an image nor a folder of images"),
    ("score {pic} --refs none", "none is neither an image nor a folder of images"),
    ("score {tmp}/lines.txt --refs {pics}", "{tmp}/lines.txt is not a readable image"),
    ("score {pic} --prompts none.txt", "none.txt does not exist or is not a file"),
    ("score {pic} --prompts {tmp}/empty.txt", "{empty}.txt has 0 prompts for 1 images"),
    (
        "score {pic} --refs {pics} --device gpu",
        "--device 'gpu' is not a torch device; give cpu, cuda, cuda:1, …",
    ),
    # inspect
    ("inspect", "Missing argument 'files'."),
    ("inspect none.safetensors", "none.safetensors does not exist or is not a file"),
    (
        "inspect {tmp}/model.safetensors",
        "{lora}: 9 of 9 tensors cannot be read: model.diffusion_model.input_blocks.0.weight",
    ),
    ("inspect {tmp}/nothing.safetensors", "{tmp}/nothing.safetensors contains no tensors"),
    (
        "inspect {one} --plot x.xyz",
        "--plot x.xyz: the name must end in one of .png, .svg, .pdf, .jpg, .jpeg, .webp",
    ),
    (
        "inspect {one} --plot {tmp}/none/x.png",
        "The folder {tmp}/none does not exist; create it first",
    ),
    ("inspect {one} --plot {pic}", "{pic} exists already; choose another name, or overwrite it"),
    # init
    ("init", "Missing argument 'FOLDER'."),
    ("init none", "none is not a folder; give the folder with your LoRAs"),
    ("init {empty}", "{empty} contains no LoRA (no .safetensors)"),
    ("init {world} -o merge.txt", "merge.txt: the name of a merge file must end in .yaml or .yml"),
    (
        "init {world} -o {tmp}/none/merge.yaml",
        "The folder {tmp}/none does not exist; create it first",
    ),
    (
        "init {world} -o {tmp}/mine.yaml",
        "{tmp}/mine.yaml exists already; choose another name, or overwrite it (--overwrite)",
    ),
    # resize
    ("resize {one} -o {out}", "Give exactly one of rank, size and energy"),
    ("resize {one} -o {out} --rank 2 --size 3", "Give exactly one of rank, size and energy"),
    ("resize {one} -o {out} --rank 0", "rank must be at least 1, not 0."),
    ("resize {lora} -o {out} --rank 2", "is a whole model (a checkpoint), not a LoRA"),
    ("resize {one} {one} -o {tmp}/folder --rank 2", "Two of the files are named lora1.safetensors"),
    (
        "resize {one} {merged} -o {out} --rank 2",
        "is not a folder; results of several files go into one.",
    ),
    ("resize {one} -o {one} --rank 2", "{one} exists already; choose another name"),
    ("resize {one} -o {one} --rank 2 --overwrite", "is one of the LoRAs to merge"),
    ("resize {one} -o {out} --rank 2 --samples 3", "--samples needs a base to run"),
    ("resize {one} -o {out} --rank 2 --base none", "The base 'none' does not exist"),
    # extract
    ("extract {base} -o {out} --rank 2", "Missing argument 'TUNED'."),
    ("extract {base} none -o {out} --rank 2", "The base 'none' does not exist"),
    ("extract {base} {base} -o {out}", "Give exactly one of rank, size and energy"),
    ("extract {base} {base} -o {out} --rank 2 --prompts {tmp}/blank.txt", "has no prompts"),
    # convert
    ("convert {one} -o x.txt", "x.txt must end in .safetensors"),
    ("convert {lora} -o {out}", "is a whole model (a checkpoint), not a LoRA"),
    ("convert {one} -o {empty} --layout peft", "{empty} exists already; choose another name"),
    # bake
    ("bake {base} --lora {one}:x -o {out}", "is not FILE.safetensors, FILE.safetensors:0.8 or"),
    ("bake none --lora {one} -o {out}", "The base 'none' does not exist"),
    ("bake {base} --lora {one} -o {empty}", "{empty} exists already; choose another name"),
    ("bake {base} --lora {one} -o {out}", "{base} is a folder, and so is the result; give"),
    ("bake {base} --lora {one} -o {tmp}/none/new", "The folder {tmp}/none does not exist"),
    ("bake {base} --lora {one} -o {tmp}/new --dtype fp8", "cannot hold fp8 with scales"),
]
