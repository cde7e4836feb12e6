// Launches of the sweep on matrix units: how it is cut, how its operands are described to the unit that copies them, and
// what it does not take.
#include "launch.cuh"
#include "matrix_sweep.cuh"

namespace emc2 {

using namespace matrix_sweep;

namespace {

constexpr int kMaxSplits = 256;
constexpr int kEnding = 2;  // what the beginning and the end of a piece of work cost, in tiles; not measured

bool is_hopper(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0;
}

// That run at the same time: a block takes all shared memory of a multiprocessor.
int64_t count_clusters(int device) {
  int processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return processors / kCluster > 0 ? processors / kCluster : 1;
}

// Into how many splits the keys are cut, so that all clusters have the same to do.
int64_t count_splits(int64_t rows, int64_t keys, int device) {
  const int64_t clusters = count_clusters(device);
  const int64_t of_rows = (rows + kClusterRows - 1) / kClusterRows, tiles = keys / kTileKeys;
  int64_t best = 1, least = INT64_MAX;
  for (int64_t splits = 1; splits <= kMaxSplits && splits <= tiles; ++splits) {
    if (tiles % splits != 0) continue;
    const int64_t duration = (of_rows * splits + clusters - 1) / clusters * (tiles / splits + kEnding);
    if (duration < least) best = splits, least = duration;
  }
  return best;
}

const char* encode_operands(MatrixSweep& sweep) {
  const Operands& operands = sweep.operands;
  const auto dim = static_cast<uint64_t>(operands.dim), key_bytes = static_cast<uint64_t>(2 * operands.key_stride);
  const auto length = static_cast<uint64_t>(sweep.segment_length);
  const char* error = hopper::encode<2>(sweep.query_map, operands.queries, operands.dtype,
                                        {dim, static_cast<uint64_t>(sweep.num_rows)},
                                        {static_cast<uint64_t>(2 * operands.query_stride)}, {kChunk, kBlockRows});
  if (error) return error;
  return hopper::encode<3>(sweep.key_map, operands.keys, operands.dtype,
                           {dim, static_cast<uint64_t>(sweep.num_segments), length}, {length * key_bytes, key_bytes},
                           {kChunk, kSegments, kSteps / kCluster});
}

const char* why_not(const Walk& walk, int64_t scratch_bytes, int64_t needed, int device) {
  const Operands& operands = walk.operands;
  if (!is_hopper(device)) return "a sweep on matrix units needs a GPU of compute capability 9.0";
  const auto is_pack = [](const void* rows, int64_t stride) {
    return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride % 8 == 0;
  };
  if (operands.dtype == Dtype::kFloat32) return "a sweep on matrix units takes bfloat16 and float16";
  if (operands.dim == 0 || operands.dim > kMaxChunks * kChunk) return "a sweep on matrix units takes rows of 1 to 512";
  if (walk.num_keys == 0 || walk.num_keys % kTileKeys != 0) return "a sweep on matrix units takes multiples of 128 keys";
  if (walk.first_proposal % 4 != 0) return "a sweep on matrix units starts at a block of draws";
  if (!is_pack(operands.queries, operands.query_stride) || !is_pack(operands.keys, operands.key_stride)) {
    return "a sweep on matrix units takes rows that start at multiples of 16 bytes";
  }
  if (operands.query_stride < operands.dim || operands.key_stride < operands.dim) {
    return "a sweep on matrix units takes rows that do not overlap";
  }
  if (walk.log_proposal || walk.step_output.accepted || walk.step_output.lse) {
    return "a sweep on matrix units has no proposal weights, and counts and sums nothing";
  }
  return scratch_bytes >= needed ? nullptr : "a sweep on matrix units got too little scratch memory";
}

template <class Element>
const char* launch_typed(const MatrixSweep& sweep, int64_t items, LaunchTarget target) {
  const int64_t at_once = count_clusters(target.device);
  const Extent extent{kCluster * (items < at_once ? items : at_once), kThreads, sizeof(Shared), kCluster};
  const char* error = launch(matrix_sweep_kernel<Element>, extent, target, sweep);
  if (error) return error;
  const int64_t blocks = (sweep.num_rows + kEpilogueWarps - 1) / kEpilogueWarps;
  return launch(sweep_epilogue_kernel, {blocks, kEpilogueWarps * kWarp}, target,
                static_cast<const SegmentedWalk&>(sweep));
}

}  // namespace

const char* load_matrix_sweep(int device) {
  if (!is_hopper(device)) return nullptr;  // which may not have that much shared memory
  const char* error = load({kernel_pointer(sweep_epilogue_kernel)}, device);
  for (const void* kernel : {kernel_pointer(matrix_sweep_kernel<Bfloat16>), kernel_pointer(matrix_sweep_kernel<Float16>)}) {
    if (!error) error = load({kernel}, device, sizeof(Shared));
  }
  return error;
}

int64_t matrix_sweep_scratch(int64_t rows, int64_t keys, int64_t samples, int device) {
  const int64_t segments = count_splits(rows, keys, device) * kSegments;
  return rows * (segments + samples) * static_cast<int64_t>(sizeof(StoredTransition));
}

const char* launch_matrix_sweep(const Walk& walk, void* scratch, int64_t scratch_bytes, LaunchTarget target) {
  const int64_t needed = matrix_sweep_scratch(walk.num_rows, walk.num_keys, walk.num_samples, target.device);
  if (const char* error = why_not(walk, scratch_bytes, needed, target.device)) return error;
  if (walk.num_rows == 0) return nullptr;
  MatrixSweep sweep{};
  static_cast<Walk&>(sweep) = walk;
  sweep.clock = sample_clock(walk, walk.first_proposal, kWarp);
  sweep.splits = count_splits(walk.num_rows, walk.num_keys, target.device);
  sweep.num_segments = sweep.splits * kSegments;
  sweep.segment_length = walk.num_keys / sweep.num_segments;
  sweep.segments = static_cast<StoredTransition*>(scratch);
  sweep.records = sweep.segments + walk.num_rows * sweep.num_segments;
  sweep.tiles = static_cast<int32_t>(sweep.segment_length / kSteps);
  sweep.chunks = static_cast<int>((walk.operands.dim + kChunk - 1) / kChunk);
  sweep.clusters_of_rows = (walk.num_rows + kClusterRows - 1) / kClusterRows;
  const DeviceScope scope(target.device, true);
  if (scope.error() != cudaSuccess) return cudaGetErrorString(scope.error());
  if (const char* error = encode_operands(sweep)) return error;
  const int64_t items = sweep.clusters_of_rows * sweep.splits;
  return walk.operands.dtype == Dtype::kBfloat16 ? launch_typed<Bfloat16>(sweep, items, target)
                                                 : launch_typed<Float16>(sweep, items, target);
}

}  // namespace emc2
