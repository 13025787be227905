// Image to patches: see metis_kernels/patchify/api.py for the contract. PyTorch's stable ABI.
//
// A patch is copied row by row: 3 x patch bytes are looked up in the table, which stays in the L1 cache, and written as one run
// for each colour. What is written is 3 x temporal numbers a pixel, and that is what it costs.

#include <cstdint>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Patches that a thread takes at least, about 10 microseconds of work: waking it takes as long.
constexpr int64_t kGrain = 16;

struct Grid {
  int64_t width, columns;  // of the image, in pixels and in patches
  int64_t patch, temporal, merge;
};

// Word: what holds a number of the table, whose bits are copied.
template <class Word>
void copy_patch(const Grid& grid, const uint8_t* image, const Word* table, int64_t number, Word* out) {
  // blocks of merge x merge patches, row by row, and the patches of a block row by row
  const int64_t in_block = grid.merge * grid.merge, block = number / in_block, blocks = grid.columns / grid.merge;
  const int64_t row = block / blocks * grid.merge + number % in_block / grid.merge;
  const int64_t column = block % blocks * grid.merge + number % grid.merge;
  const int64_t area = grid.patch * grid.patch;
  for (int64_t y = 0; y < grid.patch; ++y) {
    const uint8_t* const from = image + ((row * grid.patch + y) * grid.width + column * grid.patch) * 3;
    for (int64_t colour = 0; colour < 3; ++colour) {
      const Word* const values = table + 256 * colour;
      Word* const to = out + colour * grid.temporal * area + y * grid.patch;
      for (int64_t x = 0; x < grid.patch; ++x) to[x] = values[from[3 * x + colour]];
    }
  }
  for (int64_t colour = 0; colour < 3; ++colour) {
    Word* const first = out + colour * grid.temporal * area;
    for (int64_t frame = 1; frame < grid.temporal; ++frame) std::memcpy(first + frame * area, first, area * sizeof(Word));
  }
}

template <class Word>
void copy_all(const Grid& grid, const Tensor& image, const Tensor& table, Tensor& out) {
  const uint8_t* const pixels = image.const_data_ptr<uint8_t>();
  const Word* const values = (const Word*)table.const_data_ptr();
  Word* const patches = (Word*)out.data_ptr();
  const int64_t size = out.size(1);
  torch::stable::parallel_for(0, out.size(0), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) copy_patch(grid, pixels, values, number, patches + number * size);
  });
}

Tensor patchify(Tensor image, Tensor table, int64_t patch, int64_t temporal, int64_t merge) {
  STD_TORCH_CHECK(image.dim() == 3 && image.size(2) == 3 && image.is_contiguous() && image.scalar_type() == ScalarType::Byte,
                  "patchify: expected a contiguous uint8 image [height, width, 3]");
  STD_TORCH_CHECK(table.numel() == 3 * 256 && table.is_contiguous(), "patchify: expected a contiguous table [3, 256]");
  STD_TORCH_CHECK(patch > 0 && temporal > 0 && merge > 0 && image.size(0) % (patch * merge) == 0 &&
                      image.size(1) % (patch * merge) == 0,
                  "patchify: expected an image of whole blocks of patches");
  const bool wide = table.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(wide || table.scalar_type() == ScalarType::BFloat16 || table.scalar_type() == ScalarType::Half,
                  "patchify: expected a table of float32, bfloat16 or float16");
  const Grid grid{image.size(1), image.size(1) / patch, patch, temporal, merge};
  Tensor out = torch::stable::new_empty(
      table, {image.size(0) / patch * grid.columns, 3 * temporal * patch * patch}, table.scalar_type());
  if (wide)
    copy_all<uint32_t>(grid, image, table, out);
  else
    copy_all<uint16_t>(grid, image, table, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(metis_kernels_cpu, m) {
  m.def("patchify(Tensor image, Tensor table, int patch, int temporal, int merge) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(metis_kernels_cpu, CPU, m) { m.impl("patchify", TORCH_BOX(&patchify)); }
