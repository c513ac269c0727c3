"""What people type who come from TRL, ms-swift, axolotl, LLaMA-Factory, DistiLLM or verl, and what it is here."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Foreign:
    """A setting of other tools: its names there (`*` stands for any ending), and the settings here that do its work.

    A dot in `here` leads into a mapping. Where `here` is empty, nothing does this work, and `advice` says what to do.
    """

    names: str
    here: str = ""
    advice: str = ""

    def matches(self, key: str) -> bool:
        """Whether a key, in small letters and with underscores, is this setting."""
        return any(fnmatchcase(key, name) for name in self.names.split())

    @property
    def sentence(self) -> str:
        """What it is here, as the end of a sentence that says that there is no such setting."""
        if not self.here:
            return f"nothing here does the same: {self.advice}"
        *others, last = self.here.split()
        named = f"{', '.join(others)} and {last}" if others else last
        return f"here it is {named}" + (f": {self.advice}" if self.advice else "")


# By theme, in the order of a run file. Only names that are no settings here; tests/test_messages.py checks it.
FOREIGN: dict[str, tuple[Foreign, ...]] = {
    "Models": (
        Foreign(
            "model model_name model_name_or_path model_path model_id base_model student_model student_model_*",
            "student",
        ),
        Foreign(
            "teacher_model teacher_model_name_or_path teacher_model_path teacher_name_or_path teacher_path", "teacher"
        ),
        Foreign(
            "tokenizer tokenizer_name_or_path tokenizer_path teacher_tokenizer* processing_class",
            "student",
            "its tokenizer is taken, and the teacher has to share it",
        ),
        Foreign("revision model_revision", "model_init_kwargs.revision"),
        Foreign("teacher_model_revision teacher_revision", "teacher_model_init_kwargs.revision"),
        Foreign("torch_dtype model_dtype student_dtype", "dtype"),
        Foreign("mixed_precision compute_dtype", "precision", "auto, float32 or bf16"),
        Foreign(
            "attn_impl flash_attn flash_attention use_flash_attn* use_flash_attention* sdp_attention",
            "attn_implementation",
            "sdpa, flash_attention_2, ...",
        ),
        Foreign(
            "device_map max_memory teacher_device_map",
            "teacher_model_init_kwargs.device_map device",
            "a teacher may be spread over several GPUs, while the student is whole on the device of its process",
        ),
        Foreign(
            "n_gpu n_gpus n_gpus_per_node num_gpus nproc_per_node nnodes num_nodes world_size",
            advice="start one process for each GPU, with torchrun --nproc-per-node N -m switchkd train RUN.yaml",
        ),
        Foreign(
            "load_in_4bit load_in_8bit quant_bits quant_method quantization quantization_bit bnb_4bit_* bits",
            "teacher_quantization student_quantization",
            "8bit or 4bit; a student's needs peft",
        ),
        Foreign("offload_teacher_model offload_model", "teacher_offload", "cpu or disk"),
        Foreign(
            "teacher_model_server* teacher_server* use_teacher_server teacher_api*",
            "teacher",
            "the address of a server of vLLM's, http://HOST:PORT, with teacher_signal: {top_k: 20}; for methods whose text the "
            "student or the data writes (docs/vllm.md)",
        ),
        Foreign(
            "teacher_deepspeed",
            advice="the teacher is loaded beside the student; teacher_quantization, teacher_offload, or device_map in "
            "teacher_model_init_kwargs make room for it",
        ),
        Foreign(
            "ref_model ref_model_* reference_model kl_coef kl_loss_coef kl_penalty_coef init_kl_coef",
            "start_weight",
            "the weight of an added divergence to the model that the run starts from",
        ),
    ),
    "Adapters": (
        Foreign(
            "use_peft use_lora peft_config peft_type finetuning_type train_type tuner_type",
            "peft",
            "with peft: {r: 16} the run trains an adapter, without it the whole model",
        ),
        Foreign("lora_r lora_rank", "peft.r"),
        Foreign("lora_target lora_target_modules lora_target_linear target_modules", "peft.target_modules"),
        Foreign("lora_modules_to_save modules_to_save", "peft.modules_to_save"),
        Foreign(
            "lora_* use_rslora use_dora init_lora_weights", "peft", "write settings of peft.LoraConfig in this mapping"
        ),
        Foreign("merge_adapter merge_lora merge_and_unload", "adapter", "merge or keep"),
    ),
    "Data": (
        Foreign(
            "dataset datasets dataset_name dataset_path dataset_id data data_path train_dataset train_file train_files "
            "training_data",
            "train_data",
            "the name of a set, a file, or OWNER/NAME on the hub",
        ),
        Foreign(
            "eval_dataset eval_file val_dataset val_data val_file val_files validation_file test_dataset test_file",
            "eval_data",
        ),
        Foreign(
            "val_set_size val_size split_dataset_ratio test_split_ratio",
            "eval_data",
            "nothing is split off by itself, so name a file or a split",
        ),
        Foreign(
            "split train_split test_split dataset_split dataset_train_split dataset_test_split",
            "train_data eval_data",
            "a split stands behind the name, as in OWNER/NAME:train",
        ),
        Foreign("lm_data_dir lm_coef", advice="a loss on a pre-training corpus beside the distillation is not here"),
        Foreign("dataset_dir base_path", "data_dir"),
        Foreign(
            "max_samples max_train_samples num_train_samples",
            "train_data max_steps",
            "take a slice of a hub set, as in OWNER/NAME:train[:1000], or fewer steps",
        ),
        Foreign(
            "packing sample_packing eval_sample_packing neat_packing padding_free pad_to_sequence_len group_by_length",
            advice="leave it out; sequences of like length share a forward in any case",
        ),
        Foreign(
            "dataset_num_proc preprocessing_num_workers dataset_prepared_path lazy_tokenize use_hf use_modelscope",
            advice="leave it out",
        ),
        Foreign(
            "train_on_inputs train_on_prompt mask_prompt completion_only_loss assistant_only_loss loss_scale",
            "train_turns",
            "responses alone are trained; of conversations the last answer, or all",
        ),
    ),
    "Chats": (
        Foreign(
            "chat_template chat_template_path chat_template_jinja template",
            "template_from",
            "student, teacher, or the path of a template file",
        ),
        Foreign("enable_thinking thinking thinking_mode", "chat_template_kwargs", "{enable_thinking: false}"),
        Foreign(
            "system system_prompt system_message default_system",
            advice="put it into the data, as a first message of the role system",
        ),
        Foreign("add_bos_token add_special_tokens", "add_bos", "auto, always or never"),
        Foreign(
            "eos_token eos_token_id stop stop_words stop_sequences stop_token_ids",
            advice="rollouts end where the generation config of either model, or the chat template, ends a text",
        ),
    ),
    "Lengths": (
        Foreign(
            "max_length max_len max_seq_length max_seq_len seq_length sequence_len cutoff_len max_model_len "
            "model_max_length",
            "max_prompt_tokens max_new_tokens",
            "prompt and response have a limit each",
        ),
        Foreign("max_prompt_length max_prompt_len prompt_length", "max_prompt_tokens"),
        Foreign(
            "max_completion_length max_response_length max_tokens max_output_tokens max_gen_len max_generation_length "
            "response_length completion_length",
            "max_new_tokens",
        ),
        Foreign(
            "truncation truncation_mode truncation_strategy",
            "max_prompt_tokens skip_bad_rows",
            "a longer prompt is a bad row, and responses are cut at max_new_tokens",
        ),
    ),
    "Rollouts": (
        Foreign(
            "use_vllm vllm_* rollout_engine infer_backend gpu_memory_utilization tensor_parallel_size "
            "tensor_model_parallel_size sglang*",
            "vllm",
            "the address of a `switchkd serve` with both models, or here (docs/vllm.md); left out, the training process writes",
        ),
        Foreign(
            "num_generations num_return_sequences n_samples rollout_n group_size num_rollouts",
            advice="each row is rolled out once a step; for more rows a step raise gradient_accumulation_steps",
        ),
        Foreign(
            "generation_batch_size rollout_batch_size",
            "rollout_rows",
            "rollouts in flight at a time, which changes no token",
        ),
        Foreign("steps_per_generation", "rollout_steps", "counted in optimizer steps, each with all its micro-batches"),
        Foreign("do_sample greedy", "temperature", "0 is greedy"),
        Foreign("rollout_temperature sampling_temperature", "temperature"),
        Foreign("gen_top_p", "top_p"),
        Foreign(
            "generation_config generation_kwargs min_p typical_p repetition_penalty gen_num_beams num_beams",
            "temperature top_p top_k",
            "these three alone shape the sampling",
        ),
        Foreign(
            "log_completions log_completions_steps show_rollouts num_completions_to_print log_val_generations log_rollouts",
            "show_rollouts_every",
        ),
        Foreign(
            "ppo_epochs num_iterations", "replay_capacity", "a rollout trains once, unless it is kept and drawn again"
        ),
    ),
    "Distillation": (
        Foreign(
            "rlhf_type kd_trainer kd_trainer_args trainer_type kd_type rl", "method", "`switchkd methods` lists them"
        ),
        Foreign("stage", "method stages", "one training is a method, several in turn are stages"),
        Foreign(
            "beta jsd_beta gkd_beta",
            "divergence.teacher_weight",
            "write divergence: {name: jensen_shannon, teacher_weight: 0.5}; TRL's beta 0 is forward_kl, 1 is reverse_kl",
        ),
        Foreign(
            "alpha",
            "divergence.teacher_weight divergence.student_weight",
            "the mixture in jensen_shannon, skewed_forward_kl and skewed_reverse_kl; beside cross-entropy it is "
            "cross_entropy_weight, of LoRA peft.lora_alpha",
        ),
        Foreign(
            "skew_alpha skl_alpha skew",
            "divergence.teacher_weight divergence.student_weight",
            "of skewed_forward_kl and skewed_reverse_kl",
        ),
        Foreign(
            "kl_type loss_type loss_fn divergence_type kd_loss kd_loss_type distill_loss type reverse_kl forward_kl jsd",
            "divergence",
            "forward_kl, reverse_kl, jensen_shannon, ...",
        ),
        Foreign(
            "lmbda lambda lambda_ lam student_data_fraction on_policy_ratio on_policy_prob student_gen on_policy",
            "student_share",
            "1 is purely on-policy, 0 is the data set's text",
        ),
        Foreign("seq_kd use_seq_kd seqkd", "method", "seqkd has the teacher write the responses once"),
        Foreign(
            "sft_alpha kd_ce_alpha ce_alpha ce_weight sft_loss_weight sft_loss_coef hard_label_weight",
            "cross_entropy_weight",
            "it is added to the divergence, on the text that cross_entropy_on names",
        ),
        Foreign(
            "kd_alpha kd_ratio kd_weight kd_loss_coef distill_weight distillation_alpha",
            "cross_entropy_weight",
            "the divergence has weight 1, so a share a of it is a cross_entropy_weight of (1 - a) / a",
        ),
        Foreign("kd_temperature distill_temperature distillation_temperature loss_temp", "loss_temperature"),
        Foreign("tau tau_0 tau0 switch_threshold jsd_threshold", "threshold", "in nats, or auto"),
        Foreign(
            "decay_factor threshold_decay lambda_decay",
            "final_fraction decay_rate",
            "the threshold at the last position / at the first, or its decay per token",
        ),
        Foreign("mixed_alpha", "student_share", "the share of sequences that the student writes"),
        Foreign("teacher_mixed_alpha", "policy.teacher_share", "write policy: {name: mix, teacher_share: 0.2}"),
        Foreign("init_threshold", "student_share", "where it begins, with method: distillm, whose share_rise is 0.1"),
        Foreign(
            "loss_eps", advice="leave it out; the share of rollouts rises where the loss of an evaluation has risen"
        ),
        Foreign("replay_ratio", "replay_share", "a number, the share of rollouts that are drawn again"),
        Foreign("buffer_size replay_buffer_size capacity", "replay_capacity"),
        Foreign(
            "loss_top_k kd_topk teacher_top_k gkd_logits_topk top_k_logits topk_logits logits_topk loss_add_tail",
            "teacher_signal.top_k",
            "with all other ids as one event; left out, the divergence is over the whole vocabulary, in chunks that fit the memory",
        ),
        Foreign("use_uld_loss uld_* use_extended_uld", advice="student and teacher have to share a tokenizer"),
        Foreign(
            "reward_funcs reward_model reward_fn* reward_scaling custom_reward_function",
            advice="the teacher alone is the signal; `switchkd methods` lists what is made of it",
        ),
    ),
    "Training": (
        Foreign("lr actor_lr max_lr peak_lr", "learning_rate"),
        Foreign(
            "batch_size micro_batch_size train_batch_size global_batch_size mini_batch_size train_micro_batch_size_per_gpu "
            "per_gpu_train_batch_size ppo_mini_batch_size ppo_micro_batch_size*",
            "per_device_train_batch_size gradient_accumulation_steps",
            "a step has their product, times the processes, as sequences",
        ),
        Foreign("eval_batch_size per_gpu_eval_batch_size", "per_device_eval_batch_size"),
        Foreign(
            "grad_accum gradient_accumulation grad_acc_steps accumulate_grad_batches", "gradient_accumulation_steps"
        ),
        Foreign("epochs num_epochs total_epochs max_epochs n_epochs", "num_train_epochs"),
        Foreign(
            "steps num_steps train_steps total_steps total_iters num_train_steps max_train_steps total_training_steps",
            "max_steps",
        ),
        Foreign("optimizer optimizer_name optimizer_type", "optim"),
        Foreign("scheduler lr_scheduler lr_schedule lr_decay_style", "lr_scheduler_type"),
        Foreign(
            "warmup_ratio lr_warmup_ratio warmup_iters num_warmup_steps lr_warmup_steps",
            "warmup_steps",
            "a number below 1 is a share of all steps",
        ),
        Foreign("clip_grad grad_clip gradient_clipping gradient_clip_val max_norm", "max_grad_norm"),
        Foreign("wd", "weight_decay"),
        Foreign("random_seed manual_seed rng_seed seed_order", "seed"),
        Foreign(
            "gradient_checkpoint use_gradient_checkpointing activation_checkpoint recompute", "activation_checkpointing"
        ),
        Foreign("no_cuda use_mps_device", "device", "auto, cpu, cuda or mps"),
        Foreign("zero_stage deepspeed_config strategy", "deepspeed", "a DeepSpeed file of ZeRO-1 or ZeRO-2"),
        Foreign(
            "sequence_parallel_size context_parallel_size pipeline_parallel* pipeline_model_parallel* ulysses* tp_size",
            advice="leave it out; each process holds the whole student",
        ),
        Foreign("freeze_* unfrozen_parameters trainable_*", "peft", "either all weights are trained, or an adapter"),
        Foreign(
            "actor_rollout_ref critic", "method", "a run file is flat, and `switchkd methods` lists what can be run"
        ),
    ),
    "The run": (
        Foreign("output out_dir output_path save_path save_dir save default_local_dir", "output_dir"),
        Foreign(
            "overwrite_output_dir",
            "output_dir",
            "no run writes over another, so give a new folder or go on with --resume",
        ),
        Foreign("resume resume_from auto_resume", advice="add --resume to the command"),
        Foreign(
            "evaluation_strategy eval_freq test_freq eval_every eval_interval evals_per_epoch val_check_interval",
            "eval_strategy eval_steps",
        ),
        Foreign("save_freq save_every save_interval saves_per_epoch checkpoint_interval", "save_steps"),
        Foreign("log_every log_interval logging_interval logging_freq", "logging_steps"),
        Foreign(
            "logger loggers use_wandb wandb wandb_* swanlab_*",
            "report_to project run_name",
            "report_to: wandb, trackio, tensorboard, ...",
        ),
        Foreign("project_name", "project"),
        Foreign("experiment_name exp_name", "run_name"),
        Foreign("logging_dir log_dir", "output_dir", "log.jsonl is there"),
        Foreign("push_to_hub_model_id hub_repo hf_repo repo_id", "hub_model_id"),
    ),
}
