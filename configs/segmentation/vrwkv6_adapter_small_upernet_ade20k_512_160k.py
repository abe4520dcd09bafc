# command:  torchrun --nproc_per_node=8 tools/train_segmentor.py \
#               configs/segmentation/vrwkv6_adapter_small_upernet_ade20k_512_160k.py
# hardware: 8 GPUs
# time:     not run
# result:   not run
#
# Settings of the config for VRWKV.
# Starts from the authors' vrwkv6_s_in1k_224.pth (huggingface.co/OpenGVLab/Vision-RWKV), which is to lie in pretrained/.
_base_ = "./vrwkv_adapter_small_upernet_ade20k_512_160k.py"

model = dict(
    backbone=dict(
        model="vrwkv6_small_patch16_224",
        init_cfg=dict(checkpoint="pretrained/vrwkv6_s_in1k_224.pth"),
    ),
)
