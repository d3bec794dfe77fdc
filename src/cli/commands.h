// The subcommands of `detour`, one file each. Each function registers its subcommand with options,
// help and an example; the work is done in the subcommand's callback. A callback throws what goes
// wrong (main prints it as one line); an exit code other than 0, 1 and 2 is
// CLI::RuntimeError(code).
#pragma once

namespace CLI {
class App;
}

namespace detour::cli {

void AddTokenizerCommand(CLI::App& app);
void AddPrepareCommand(CLI::App& app);
void AddTrainCommand(CLI::App& app);
void AddEvalCommand(CLI::App& app);
void AddGenerateCommand(CLI::App& app);
void AddChatCommand(CLI::App& app);
void AddLogitsCommand(CLI::App& app);
void AddConvertCommand(CLI::App& app);
void AddInfoCommand(CLI::App& app);
void AddVerifyCommand(CLI::App& app);
void AddReportCommand(CLI::App& app);
void AddRouteCommand(CLI::App& app);

}  // namespace detour::cli
