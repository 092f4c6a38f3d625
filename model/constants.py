"""Facts about the released components that several modules need."""

VAE_SCALE = 8  # pixels per latent along each side, of Qwen-Image's VAE; diffusers derives it as 2 ** 3 temporal stages
TILE_PX = 2 * VAE_SCALE  # a token is 2 x 2 latents: sides of images are multiples of it
PAD_MULTIPLE = 8  # tokens: NucleusMoEImagePipeline.encode_prompt pads prompts to a multiple of it
PIPELINE_TEXT_STATE = -8  # NucleusMoEImagePipeline's default_return_index: the hidden state that conditions images
