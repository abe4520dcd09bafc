"""The model card that goes to a hub with a model's weights."""

from typing import Any

from vrwkv.models._base import VisionRWKVBase

CITATION = """@inproceedings{duan2025vision,
  title     = {Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures},
  author    = {Duan, Yuchen and Wang, Weiyun and Chen, Zhe and Zhu, Xizhou and Lu, Lewei and Lu, Tong and Qiao, Yu and
               Li, Hongsheng and Dai, Jifeng and Wang, Wenhai},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}"""


def model_card(model: VisionRWKVBase, repo_id: str, **details: str) -> dict[str, Any]:
    """What timm writes into a model's README, from what the model says of itself.

    ``timm.models.push_to_hf_hub(model, repo_id, model_card=model_card(model, repo_id, Dataset="ImageNet-1k"))``

    Args:
        model: made by `timm.create_model`.
        repo_id: "owner/name", where the usage that it shows loads the model from.
        details: what the model cannot know, such as its data set or accuracy.

    Returns:
        `model_card` of `timm.models.push_to_hf_hub`.
    """
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment] # timm sets it
    height, width = model.patch_embed.img_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "license": cfg["license"],
        "description": f"A {cfg['architecture']} of the package vrwkv. Images may have any size.",
        "details": {
            "Model Type": "image classification" if model.num_classes else "image features",
            "Model Stats": {
                "Parameters (M)": f"{parameters / 1e6:.2f}",
                "Classes": str(model.num_classes),
                "Image size": f"{height} x {width}",
            },
            "Paper": f"{cfg['paper_name']}: https://{cfg['paper_ids'].replace(':', '.org/abs/').lower()}",
            "Original": cfg["origin_url"],
            **details,
        },
        "usage": (
            "```python\nimport timm, vrwkv    # vrwkv registers the model\n\n"
            f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()\n```'
        ),
        "citation": CITATION,
    }
