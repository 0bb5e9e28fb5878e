#include "tape_memory.h"

// The address sanitizer knows where torch's memory ends, and not where this does.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#include <sys/mman.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <mutex>
#include <vector>

// Of torch's stable interface from 2.11 on; null where the running torch has none.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace dsc::cpu {
namespace {

struct Block {
  void* memory;
  size_t bytes;
};

// Memory that no tape has at the moment. Whoever finds another thread here goes to the system instead of waiting, so a
// process forked at such a time never waits for a thread that it does not have.
class FreeBlocks {
 public:
  // The smallest block that is large enough. A new one takes the place of one that was too small, so there are never
  // more blocks than there were tapes at once.
  Block take(size_t bytes) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock && !blocks_.empty()) {
      const auto found = std::lower_bound(blocks_.begin(), blocks_.end(), bytes,
                                          [](const Block& block, size_t least) { return block.bytes < least; });
      const auto taken = found == blocks_.end() ? std::prev(found) : found;
      const Block block = *taken;
      blocks_.erase(taken);
      if (block.bytes >= bytes) return block;
      munmap(block.memory, block.bytes);
    }
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? Block{} : Block{memory, bytes};
  }

  void give(const Block& block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || madvise(block.memory, block.bytes, MADV_FREE) != 0) {
      munmap(block.memory, block.bytes);
      return;
    }
    blocks_.insert(std::upper_bound(blocks_.begin(), blocks_.end(), block.bytes,
                                    [](size_t bytes, const Block& other) { return bytes < other.bytes; }),
                   block);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;  // by size
};

FreeBlocks& free_blocks() {
  static FreeBlocks* const blocks = new FreeBlocks;  // for tapes that live as long as the process
  return *blocks;
}

}  // namespace

Tensor tape_memory(const Tensor& model, int64_t bytes) {
  const Block block =
      torch_from_blob && bytes >= 4 * large_page ? free_blocks().take(static_cast<size_t>(bytes)) : Block{};
  if (!block.memory) return torch::stable::new_empty(model, {bytes}, ScalarType::Byte);
  auto owned = std::make_unique<Block>(block);
  const int64_t stride = 1;
  AtenTensorHandle tape = nullptr;
  const AOTITorchError error = torch_from_blob(
      block.memory, 1, &bytes, &stride, 0, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), -1, &tape,
      aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) {
        const std::unique_ptr<Block> block(static_cast<Block*>(context));
        free_blocks().give(*block);
      },
      owned.get());
  if (error != AOTI_TORCH_SUCCESS) {
    free_blocks().give(block);
    STD_TORCH_CHECK(false, "dsc_ops: torch refused the memory of a tape");
  }
  owned.release();
  return Tensor(tape);
}

}  // namespace dsc::cpu

#else

namespace dsc::cpu {

Tensor tape_memory(const Tensor& model, int64_t bytes) {
  return torch::stable::new_empty(model, {bytes}, ScalarType::Byte);
}

}  // namespace dsc::cpu

#endif
