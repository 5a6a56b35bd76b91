"""Options, verbs and models as other tools name them, and ours for the same purpose: data alone.

The tools: A1111 (AUTOMATIC1111's page, and Forge's), BFL (black-forest-labs/flux), ComfyUI, diffusers, DiffusionKit,
Draw Things (its app and draw-things-cli), fal, InvokeAI, krea (krea-ai/flux-krea), mflux, mlx-examples, mlx-lm,
Replicate, sd.cpp.

An example in braces, --steps {28}, stands for the value that was typed, where our option takes it in the same sense.
Guidance of tools whose scale has another meaning, and names of models, are not carried over.
"""

NO_PROMPT = 'the prompt has no option: flux-krea generate "a frog"'
_LORA = "write --lora FILE=0.8, once for each adapter"
_ADAPTER_APART = "leave it out: adapters are never merged; write --lora NAME=0.8 when you generate"
_CONTROL = "write --control-image {FILE}, a map, with FLUX.1 Canny or Depth or their adapters; it takes no ControlNet"
_MAP = "write --control-image {FILE} --control canny (or depth), with a model or adapter that reads such maps"
_STYLE = "write --style FILE=0.5, once for each image; it needs FLUX.1 Redux, and takes no IP-Adapter"
_REFERENCE = "write --image {FILE} with FLUX.1 Kontext, and --reference for each further one"
_SHORTCUT = "write --fast, which computes 16 of 28 steps, or --cache first-block:0.08"
_ENLARGING = "write --upscale 2"
_T5 = "leave it out: the model's own length is used; --like comfy has 256"
_MASK = "write --image FILE --mask {MASK}, white where the image is repainted"
_AUTOMATIC = "leave it out: memory is planned, and --memory 8GB sets a limit"
_SIZE = "write --width {1024} --height {768}, or --aspect 4:3"
_SAMPLER = "write --solver euler (the usual one), dpmpp_2m or heun"
_SCHEDULE = "write --schedule beta or simple; leave it out for the model's own noise levels"
_GUIDANCE = "write --guidance 4.5 (for a scale of --negative-prompt: --true-cfg-scale)"
_QUANTIZE = "weights are quantized once, by flux-krea convert SOURCE -q 8"
_COUNT = "write -n {4}"
_IMAGE = "write --image {FILE}"
_OUTPUT = "write -o FOLDER/{n}.png"
_MODEL = "write -m NAME, of flux-krea models"
_FILES = "files are named once, for flux-krea convert; then -m NAME"
_CHECKED = "leave it out: flux-krea setup asks who checks pictures, and --check chooses"
_HERE = "leave it out: everything runs on this machine's GPU"

# Names of options without dashes, with _ for -; the tools that have them; the answer.
OPTIONS = (
    # size
    ("W", "sd.cpp, A1111, InvokeAI", "write --width {1024}"),
    ("w", "krea, BFL", "write --width {1024}"),
    ("H", "sd.cpp, A1111, InvokeAI", "write --height {1024}"),
    ("size image_size", "mlx-examples, fal", _SIZE),
    ("resolution res", "ComfyUI, BFL", _SIZE),
    ("aspect_ratio ar", "Replicate, BFL, Midjourney", "write --aspect {3:2}"),
    # steps, guidance and sampler
    ("num_inference_steps inference_steps", "diffusers, Replicate", "write --steps {28}"),
    ("num_steps", "BFL, krea", "write --steps {28}"),
    ("step sampling_steps ddim_steps", "A1111", "write --steps {28}"),
    ("s", "sd.cpp, draw-things-cli; steps in InvokeAI and krea", "write --seed {7}, or --steps {28}"),
    ("guidance_scale", "diffusers, fal, Draw Things", "write --guidance {4.5}"),
    ("g", "krea, BFL", "write --guidance {4.5}"),
    ("cfg", "ComfyUI, DiffusionKit, draw-things-cli", _GUIDANCE),
    ("cfg_scale C", "sd.cpp, A1111, InvokeAI", _GUIDANCE),
    ("scale distilled_guidance distilled_cfg_scale distilled_cfg", "A1111, Forge", _GUIDANCE),
    ("true_cfg", "diffusers", "write --true-cfg-scale {2} with --negative-prompt TEXT"),
    ("scheduler", "mflux, ComfyUI, InvokeAI, sd.cpp", _SCHEDULE),
    ("sampler sampler_name sampling_method A", "ComfyUI, A1111, sd.cpp, InvokeAI, Draw Things", _SAMPLER),
    ("sigmas shift flow_shift base_shift max_shift", "diffusers, sd.cpp, Draw Things", _SCHEDULE),
    ("clip_skip", "A1111, sd.cpp, Draw Things", "leave it out: FLUX.1 reads CLIP's last layer"),
    ("max_sequence_length t5_length", "diffusers", _T5),
    ("prompt_strength", "Replicate", "write --strength {0.6}"),
    # seeds and numbers
    ("S", "InvokeAI", "write --seed {7}"),
    ("generator noise_seed manual_seed seeds", "diffusers, ComfyUI", "write --seed {7}"),
    ("auto_seeds", "mflux", "write -n {4}: consecutive seeds, from a random one"),
    ("rng", "sd.cpp", "write --noise diffusers, or another tool's name"),
    ("n_iter n_samples iterations", "A1111, InvokeAI", _COUNT),
    ("batch_size batch_count b batch", "ComfyUI, A1111, Draw Things, sd.cpp", _COUNT),
    ("num_images_per_prompt num_outputs n_images count number", "diffusers, Replicate, mlx-examples", _COUNT),
    ("n_rows grid", "mlx-examples, A1111", "write --contact-sheet"),
    # prompts
    ("p prompt text", "mflux, sd.cpp, krea, draw-things-cli", NO_PROMPT),
    ("negative neg negative_text uc", "A1111, InvokeAI", "write --negative-prompt {TEXT} --true-cfg-scale 2"),
    ("no", "Midjourney", "write --negative-prompt {TEXT} --true-cfg-scale 2"),
    ("prompt_2 prompt2 clip_l_prompt", "diffusers, Draw Things", "leave it out: both encoders read the one prompt"),
    ("prompt_file prompts_file from_file", "mflux, draw-things-cli, InvokeAI", "write --prompts {FILE}"),
    # models
    ("model_path model_name ckpt checkpoint ckpt_name", "A1111, mflux, ComfyUI", _MODEL),
    ("name base_model model_version model_id", "BFL, mflux, DiffusionKit", _MODEL),
    ("diffusion_model unet unet_name transformer local_ckpt path", "sd.cpp, ComfyUI, mflux", _FILES),
    ("vae ae taesd vae_path vae_dir", "sd.cpp, ComfyUI, A1111", _FILES),
    ("clip_l t5xxl clip t5 clip_name text_encoder text_encoder_2", "sd.cpp, ComfyUI", _FILES),
    ("ckpt_dir models_dir models_path", "A1111", "set FLUX_KREA_HOME, or name the folder: -m FOLDER"),
    ("q quantize quantization bits q_bits w16 a16 fp8 type", "mflux, mlx-examples, sd.cpp", _QUANTIZE),
    ("torch_dtype precision no_half half fp16 bf16 fp32", "diffusers, A1111, ComfyUI", "write --dtype {bfloat16}"),
    ("token hf_token hf_api_key api_key", "diffusers, mflux", "log in once: hf auth login"),
    ("offline no_download_missing", "draw-things-cli", "leave it out: generate never uses the network"),
    # pictures to start from
    ("image_path init_image_path", "mflux, DiffusionKit", _IMAGE),
    ("init_img init_image i I img input_image input init", "sd.cpp, InvokeAI, A1111", _IMAGE),
    ("image_strength", "mflux", "write --strength: 1 minus mflux's, whose 0.4 is --strength 0.6"),
    ("denoise denoising_strength", "ComfyUI, A1111, DiffusionKit", "write --strength {0.6}, in the same sense"),
    ("mask_image masked_image_path inpaint mask_path", "diffusers, mflux", _MASK),
    ("image_outpaint_padding outpaint padding uncrop", "mflux, sd.cpp", "write --image FILE --expand {0,25%,0,25%}"),
    ("mask_blur feather mask_feather", "A1111, ComfyUI", "leave it out: inside a mask the edge fades over 8 pixels"),
    ("invert_mask inpaint_mask_invert", "A1111, ComfyUI", "invert the mask: white is repainted"),
    ("grow_mask_by mask_grow dilate", "ComfyUI", "draw the mask larger: what belongs to a thing, its shadow too"),
    ("pad", "ComfyUI", "write --image FILE --expand {64}"),
    ("padding_mask_crop inpaint_full_res only_masked", "diffusers, A1111", "write --crop-to-mask"),
    ("ref_image r image_paths", "sd.cpp, mflux", _REFERENCE),
    ("redux_image_paths redux_image_strengths redux style_image style_images", "mflux, InvokeAI", _STYLE),
    ("ip_adapter ip_adapter_image", "diffusers, InvokeAI", _STYLE),
    ("controlnet control_net controlnet_model control_strength controlnet_strength", "sd.cpp, diffusers", _CONTROL),
    ("controlnet_image_path depth_image_path", "mflux", _CONTROL),
    ("controlnet_save_canny save_depth_map", "mflux", "write --keep-map"),
    ("canny depth", "sd.cpp, BFL", _MAP),
    ("pose", "InvokeAI", _CONTROL),
    # adapters
    ("loras", "Draw Things, InvokeAI", _LORA),
    ("lora_paths lora_scales lora_style lora_name lora_repo_id lora_scale lora_weight", "mflux, BFL", _LORA),
    ("lora_model_dir lora_apply_mode lora_dir lora_weights", "sd.cpp", _LORA),
    ("adapter adapters fuse_adapter adapter_path adapter_name", "mlx-examples, diffusers", _LORA),
    ("embedding textual_inversion embeddings", "A1111, diffusers", "embeddings are made for other models than FLUX.1"),
    # memory and devices
    ("low_ram mlx_cache_limit_gb", "mflux", _AUTOMATIC),
    ("lowvram medvram highvram novram vram low_vram", "ComfyUI, A1111", _AUTOMATIC),
    ("low_memory_mode low_memory", "DiffusionKit", _AUTOMATIC),
    ("offload offload_to_cpu cpu_offload clip_on_cpu vae_on_cpu", "BFL, sd.cpp, diffusers", _AUTOMATIC),
    ("vae_tiling vae_tile_size vae_tiling_split tiled_decoding tile", "sd.cpp, mflux, Draw Things", _AUTOMATIC),
    ("attention_slicing xformers diffusion_fa flash_attention", "diffusers, A1111, sd.cpp", _AUTOMATIC),
    ("device gpu cpu mps cuda threads t", "BFL, sd.cpp, ComfyUI", _HERE),
    ("battery_percentage_stop_limit B", "mflux", "leave it out; Ctrl-C stops a run, and flux-krea resume continues it"),
    # files
    ("out outfile output_path output_file save save_path", "mflux, sd.cpp, InvokeAI", "write -o {FILE}"),
    ("outdir output_dir output_directory out_dir output_folder", "A1111, BFL, ComfyUI", _OUTPUT),
    ("filename_prefix prefix filename", "ComfyUI", "write -o NAME-{seed}.png"),
    ("output_format format", "Replicate, fal", "the name decides: -o out.webp"),
    ("output_quality jpeg_quality", "Replicate", "write --quality {95}"),
    ("output_type return_dict", "diffusers", "leave it out: pictures are saved as files; --json prints a report"),
    ("overwrite replace clobber", "ffmpeg and others", "delete the file first, or take the next free name as proposed"),
    ("config_from_metadata", "mflux", "write --from {PICTURE}"),
    ("stepwise_image_output_dir stepwise preview_path preview_interval", "mflux, sd.cpp", "write --preview {FILE}"),
    ("terminal_image show open", "draw-things-cli", "write --preview; the picture's path is printed"),
    ("add_sampling_metadata exif", "BFL", "write --metadata full, or minimal"),
    # other stages
    ("upscaler upscale_model hires hires_fix hires_scale hr", "A1111, sd.cpp, Draw Things", _ENLARGING),
    ("refiner refiner_start face_restore restore_faces adetailer", "A1111", "there is no second model here"),
    ("tiling seamless", "A1111, InvokeAI", "seamless pictures are not supported"),
    ("enable_safety_checker safety_checker nsfw", "fal, diffusers", _CHECKED),
    ("disable_safety_checker no_nsfw no_filter skip_filters", "Replicate", _CHECKED),
    ("teacache cache_mode go_fast turbo", "sd.cpp, Replicate, ComfyUI", _SHORTCUT),
    ("debug", "many", "write --verbose"),
    ("quiet silent", "many", "write 2>/dev/null: results alone go to standard output"),
    ("api listen port share server", "A1111, ComfyUI", "write flux-krea ui"),
)  # fmt: skip

# Options of `convert` and `setup`, in the same form.
CONVERTING = (
    ("bits q_bits quantize_bits nbits quantization precision type outtype", "mlx-lm, mflux, llama.cpp", "write -q {4}"),
    ("hf_path model path m source input", "mlx-lm, mflux", "name sources without an option: flux-krea convert SOURCE"),
    ("mlx_path out outfile out_dir output_dir save_path", "mlx-lm, llama.cpp", "write -o {FOLDER}"),
    ("q_group_size group", "mlx-lm", "write --group-size {64}"),
    ("upload_repo push_to_hub", "mlx-lm", "leave it out: nothing is uploaded"),
    ("token hf_token", "diffusers", "log in once: hf auth login"),
    ("lora lora_paths adapter", "mflux", _ADAPTER_APART),
)

# Options of `plan`, in the same form.
PLANNING = (
    ("q quantize quantization bits q_bits precision", "convert", "leave it out: flux-krea plan lists every precision"),
    ("steps num_inference_steps num_steps n num_images guidance seed", "generate",
     "leave it out: memory is the same for any, and times are those of a picture with the model's own steps"),
    ("m model", "generate", "name the model without an option: flux-krea plan NAME"),
    ("ram mem", "others", "write --memory {8GB}"),
    ("aspect megapixels size resolution", "generate", "write --width {1024} --height {768}"),
)  # fmt: skip

# Options of `ui`, in the same form.
SERVING = (
    ("host address bind listen server_name ip h share public", "A1111, ComfyUI, InvokeAI",
     "the page is open to this machine alone; from another device of yours, with the port of its link: "
     "ssh -L 7860:127.0.0.1:7860 USER@THIS-MACHINE"),
    ("p server_port", "A1111", "write --port {7860}"),
    ("autolaunch browser auto_launch open", "A1111, ComfyUI", "leave it out: only --no-open opens no browser"),
    ("token api_key password auth", "others", "leave it out: each start makes a token, which --json prints"),
)  # fmt: skip

# Verbs of other tools, and ours.
VERBS = {
    "gen": "generate",
    "run": "generate",
    "txt2img": "generate",
    "text2img": "generate",
    "txt2image": "generate",
    "create": "generate",
    "draw": "generate",
    "make": "generate",
    "image": "generate",
    "imagine": "generate",
    "prompt": "generate",
    "img2img": "generate",
    "install": "setup",
    "download": "setup",
    "pull": "setup",
    "init": "setup",
    "list": "models",
    "ls": "models",
    "remove": "models rm",
    "rm": "models rm",
    "delete": "models rm",
    "quantize": "convert",
    "import": "convert",
    "save": "convert",
    "info": "inspect",
    "show": "inspect",
    "metadata": "inspect",
    "check": "doctor",
    "status": "doctor",
    "benchmark": "bench",
    "chat": "shell",
    "interactive": "shell",
    "repl": "shell",
    "continue": "resume",
    "estimate": "plan",
    "memory": "plan",
    "settings": "config",
    "schema": "tool-schema",
    "completions": "completion",
    "web": "ui",
    "serve": "ui",
    "server": "ui",
    "gui": "ui",
}

# Verbs of other tools for work that is not done here.
MISSING_VERBS = {
    "train": "training is not supported",
    "upscale": "flux-krea generate TEXT --image FILE --upscale 2",
    "inpaint": "flux-krea generate TEXT --image FILE --mask MASK",
    "lora": "write flux-krea models add FILE, then generate --lora NAME=0.8",
    "help": "write flux-krea --help",
    "login": "log in to the hub with its own tool: hf auth login",
    "logout": "log out of the hub with its own tool: hf auth logout",
    "uninstall": "flux-krea purge deletes models and filters; then uv tool uninstall, pipx uninstall or pip uninstall, "
    "as it was installed: mlx-flux-krea",
    "edit": "with FLUX.1 Kontext: flux-krea generate TEXT -m MODEL --image FILE; through a mask: --mask MASK",
    "outpaint": "flux-krea generate TEXT --image FILE --expand 0,25%,0,25%",
    "uncrop": "flux-krea generate TEXT --image FILE --expand 0,25%,0,25%",
    "fill": "flux-krea generate TEXT --image FILE --mask MASK",
    "kontext": "flux-krea generate TEXT -m MODEL --image FILE, where MODEL is a FLUX.1 Kontext",
    "version": "write flux-krea --version",
    "update": "update it as it was installed: uv tool upgrade, pipx upgrade or pip install -U mlx-flux-krea",
    "upgrade": "update it as it was installed: uv tool upgrade, pipx upgrade or pip install -U mlx-flux-krea",
}

# Verbs below `models`, as others name them.
SUBVERBS = {
    "list": "",
    "ls": "",
    "show": "",
    "all": "",
    "remove": "rm",
    "delete": "rm",
    "uninstall": "rm",
    "use": "default",
    "select": "default",
    "set": "default",
}


def find(name: str, table: tuple[tuple[str, str, str], ...] = OPTIONS) -> tuple[str, str] | None:
    """Returns the tools that have an option, and the answer; None: the table lacks it.

    Args:
        name: with or without dashes in front, with - or _ inside; capital letters matter where it is one letter.
        table: the options of a verb.
    """
    plain = name.lstrip("-").replace("-", "_")
    plain = plain if len(plain) == 1 else plain.lower()
    return next(((tools, answer) for names, tools, answer in table if plain in names.split()), None)
