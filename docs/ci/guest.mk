# Guests from make: copy this beside your osbuild.toml, and `include guest.mk` or `make -f guest.mk`.
#
#   make image initrd     OUT/rootfs.img, OUT/initrd.img, the kernel, manifest.json and lock.json
#   make kernel           only the kernel, into the cache: what takes minutes, once
#   make smoke            both booted; OUT/smoke/report.json and its page
#   make publish REGISTRY=registry.example/guests/base:1 PUBLISH_FLAGS='--sign guest.key --authfile auth.json'
#
# A file that has changed is what makes work. Which files there are the build itself says, in OUT.d: osbuild.toml, what it
# adds, the image's own, osbuilder's. GUEST_NEEDS names more. An image that is no file (docker://, docker-daemon:) has
# no time, and no kernel source that is a repository has one: `make -B image` asks for it again.

OSBUILDER ?= osbuilder
CONFIG ?= osbuild.toml
IMAGE ?=
OUT ?= out/guest
BUILD_FLAGS ?=
SMOKE_FLAGS ?=
PUBLISH_FLAGS ?=

GUEST_NEEDS ?= $(wildcard $(CONFIG))
GUEST_CONFIG = $(if $(wildcard $(CONFIG)),--config $(CONFIG))

.PHONY: kernel image initrd smoke publish
kernel:
	$(OSBUILDER) kernel build $(GUEST_CONFIG)

image: $(OUT)/rootfs.img
initrd: $(OUT)/initrd.img
smoke: $(OUT)/smoke/report.json

# One command makes them all, and the kernel with them (make 4.3: `&:`).
$(OUT)/manifest.json $(OUT)/rootfs.img $(OUT)/initrd.img $(OUT)/vmlinux $(OUT)/vmlinuz &: $(GUEST_NEEDS)
	@mkdir -p $(dir $(OUT))
	$(OSBUILDER) build $(IMAGE) --out $(OUT) $(GUEST_CONFIG) --no-smoke --depfile $(OUT).d $(BUILD_FLAGS)
-include $(OUT).d

$(OUT)/smoke/report.json: $(OUT)/manifest.json
	@# A report that says "failed" stays, to be read, and is older than what it is about: the next make boots again.
	$(OSBUILDER) smoke $(OUT) $(SMOKE_FLAGS) || { code=$$?; touch $(OUT)/manifest.json; exit $$code; }

publish: $(OUT)/smoke/report.json
	$(if $(REGISTRY),,$(error publish needs REGISTRY=HOST/NAME:TAG))
	@# The report's time says only that somebody booted it.
	$(OSBUILDER) report $(OUT) --check
	$(OSBUILDER) publish $(OUT) $(REGISTRY) $(PUBLISH_FLAGS)
